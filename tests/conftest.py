"""What every test gets: reproducible random numbers, no network, GPU tests only where there is a GPU."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from typing import Any

# A job started in the background of a shell may ignore SIGINT, and its children with it; tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports torch or huggingface_hub: tests read no hub, whatever the machine can reach.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# Far fewer collections than by default: with all of PyTorch loaded they took a fifth of the time.
gc.set_threshold(50_000, 20, 20)


# Files whose session fixtures take seconds: one worker makes them.
OPENVINO, REPORT = "plugins/optc-openvino/tests", "tests/optc/report"
TOGETHER = {
    **{f"{OPENVINO}/test_{name}.py": OPENVINO for name in ("backend", "graph", "attention", "bfloat16", "runner")},
    **{f"{REPORT}/test_{name}.py": REPORT for name in ("page", "markdown", "optimized")},
}
# What takes long comes first, however few tests it has, so that all workers end at about the same time.
FIRST = (
    OPENVINO,
    "tests/optc/lowering/test_pipeline.py",
    "tests/optc/lowering/test_inductor.py",
    "tests/optc/cli/test_profile.py",
    "tests/optc/distributed/test_failures.py",
    "tests/optc/test_budget.py",
    "tests/optc/test_api.py",
    "tests/optc/cli/test_commands.py",
    "tests/optc/bench/test_baselines.py",
    "tests/optc/lowering/test_inductor_compile.py",
    "tests/optc/lowering/test_inductor_pack.py",
    "tests/optc/test_pipeline_api.py",
    "tests/passes/test_fuse.py",
    "tests/optc/distributed/test_torchrun.py",
    "tests/optc/lowering/test_variants.py",
    "tests/optc/cli/test_partition.py",
    "tests/optc/cli/test_compare.py",
    "tests/optc/cli/test_report.py",
    REPORT,
    "tests/optc/bench/test_statistics.py",
    "tests/examples/test_train_digits.py",
    "tests/examples/test_examples.py",
    "tests/optc/lowering/test_torch_memory.py",
    "tests/optc/lowering/test_artifact.py",
    "tests/packaging/test_wheel.py",
    "tests/docs/test_documents.py",
    "tests/passes/test_quant.py",
    "tests/passes/test_quant_reach.py",
    "tests/passes/test_partition.py",
)


def unit(nodeid: str) -> str:
    """What one worker runs: a file, or the files that share fixtures which take long to make."""
    file = nodeid.partition("::")[0]
    return TOGETHER.get(file, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out units in the order in which they are collected, not by how many tests they have."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Units(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    config.option.loadscopereorder = False
    return Units(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(unit(item.nodeid), len(place)))
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needing_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in needing_gpu:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Choices among backends are remembered in the user's cache; tests have one of their own."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """Leave out of garbage collections what is there already."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where code that is compiled for seconds is not the point: no ``inductor``, and torch.compile runs eagerly."""
    import torch._dynamo

    from optc.lowering.inductor import InductorBackend

    monkeypatch.setattr(InductorBackend, "unavailable", lambda target: "it is left out of this test")
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where latencies are not the point: each candidate is measured in two short blocks."""
    from functools import partial

    from optc.bench.measure import measure

    monkeypatch.setattr("optc.selection.measure_candidates", partial(measure, blocks=2, block_seconds=0.05))
    monkeypatch.setattr("optc.bench.measure.SETTLING_SECONDS", 0.0)
    monkeypatch.setattr("optc.contest.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("optc.bench.disturbance._LOOK_SECONDS", 0.02)
    for name in ("STEADY_SECONDS", "ARTIFACT_SECONDS", "MODEL_SECONDS"):
        monkeypatch.setattr(f"optc.cli.profiling.{name}", 1.0)


@pytest.fixture
def known_peaks() -> None:
    """What the machine can do at most, as if it had been measured before: measuring it takes seconds."""
    import json

    from optc.bench.peaks import Peaks
    from optc.bench.peaks_cache import peaks_file
    from optc.threads import available_threads

    for threads in (1, available_threads()):
        file = peaks_file(threads)
        file.parent.mkdir(parents=True, exist_ok=True)
        known = Peaks(threads, {"float32": 50e9, "int8": 4e11}, ((2**18, 8e10), (2**28, 2e10)), "earlier")
        file.write_text(json.dumps(known.__dict__))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed torch where a test uses it; importing it here would cost the tests that do not."""
    import sys

    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
