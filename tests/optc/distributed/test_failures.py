"""Ranks that die, hang or raise end the whole pipeline in time, with one message and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optc
from optc.errors import BackendError
from optc.lowering.pipeline import PipelineBackend
from optc.lowering.pipeline_file import PIPELINE, write_pipeline
from optc.lowering.pipeline_ranks import TIMEOUT_VARIABLE
from optc.lowering.pipeline_runner import PipelineRunner
from optc.program import Program
from optc.target import Target

Cut = Callable[[Program, int], Program]
SECONDS = 3.0
X = np.zeros((2, 8), np.float32)


def alive(pid: int) -> bool:
    """Whether a process runs or is stopped; a zombie is neither."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def stages(cut: Cut, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of a small model, as :mod:`optc.distributed` takes them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    folder = tmp_path_factory.mktemp("stages")
    program = cut(optc.capture(model, (torch.randn(2, 8),)), 2)
    description, _, _ = PipelineBackend(microbatches=2)._lower_stages(program, Target(threads=2, batch=2), folder)
    write_pipeline(folder, description)
    return folder


@pytest.fixture
def runner(stages: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipelineRunner]:
    monkeypatch.setenv(TIMEOUT_VARIABLE, str(SECONDS))
    loaded = PipelineBackend().load(stages, (PIPELINE,), Target(threads=2, batch=2))
    assert isinstance(loaded, PipelineRunner)
    yield loaded
    pids = loaded.pids
    loaded.close()
    assert not any(map(alive, pids))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_all_with_its_name(runner: PipelineRunner, rank: int) -> None:
    runner(X)
    os.kill(runner.pids[rank], signal.SIGKILL)
    wait_for(lambda: not alive(runner.pids[rank]))
    with pytest.raises(BackendError, match=rf"rank {rank} \(stage {rank}\) was ended by SIGKILL"):
        runner(X)
    assert not any(map(alive, runner.pids))
    with pytest.raises(BackendError, match=rf"rank {rank} \(stage {rank}\)"):
        runner(X)  # what was said once is said again


def test_a_stopped_rank_ends_all_in_time_and_tells_where_it_was(runner: PipelineRunner) -> None:
    runner(X)
    os.kill(runner.pids[1], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(BackendError, match=r"rank 1 \(stage 1\) has not answered for .* last words: File") as caught:
        runner(X)
    assert time.monotonic() - start < SECONDS + 20  # of which the machine may need some for itself
    # It was between two queries; woken to tell, it may go on while its stack is written down.
    assert any(f" in {function}" in "".join(caught.value.__notes__) for function in ("serve", "receive"))
    assert not any(map(alive, runner.pids))


def test_an_exception_in_a_rank_arrives_with_its_traceback(stages: Path, tmp_path: Path) -> None:
    import shutil

    broken = shutil.copytree(stages, tmp_path / "broken")
    weights = broken / "stage-1" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(BackendError, match=r"rank 1 \(stage 1\) raised .*ArtifactError.*weights.safetensors") as caught:
        PipelineBackend().load(broken, (PIPELINE,), Target(threads=2, batch=2))
    assert "Traceback" in "".join(caught.value.__notes__)


def in_the_last_rank(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, limit: float = 120.0) -> None:
    """Let the last of two ranks run some code in its stage; Python runs such a module when it starts."""
    (folder / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import time\n"
        "    from optc.lowering import pipeline_ranks\n"
        f"    pipeline_ranks.COMPUTING_LIMIT = {limit}\n"
        "    from optc.lowering.eager import EagerRunner\n"
        "    run_tensors = EagerRunner.run_tensors\n"
        "    def replaced(self, *inputs):\n"
        f"        {code}\n"
        "        return run_tensors(self, *inputs)\n"
        "    EagerRunner.run_tensors = replaced\n"
    )
    monkeypatch.syspath_prepend(str(folder))


def test_a_stage_that_lets_no_other_thread_run_is_not_taken_for_hung(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As compiled stages do: nothing of this line is Python's own code, so nothing lets its lock go."""
    holds = "any(map((time.monotonic() + 2.5).__lt__, iter(time.monotonic, None)))"
    in_the_last_rank(holds, tmp_path, monkeypatch)
    monkeypatch.setenv(TIMEOUT_VARIABLE, "1")
    loaded = PipelineBackend().load(stages, (PIPELINE,), Target(threads=2, batch=2))
    try:
        assert loaded(X[:1])[0].shape == (1, 4)
    finally:
        loaded.close()
    with pytest.raises(BackendError, match="this runner is closed"):
        loaded(X)


def test_a_stage_that_takes_too_long_ends_all_and_tells_where_it_was(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_last_rank("time.sleep(600)", tmp_path, monkeypatch, limit=0.5)
    loaded = PipelineBackend().load(stages, (PIPELINE,), Target(threads=2, batch=2))
    with pytest.raises(BackendError, match=r"rank 1 \(stage 1\) has computed one microbatch for .* in replaced"):
        loaded(X)
    loaded.close()


class Embeds(nn.Module):
    """Its first stage fails on numbers above 9."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(10, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embed(x).relu())


def test_what_a_stage_raises_is_told_as_it_is(cut: Cut, tmp_path: Path) -> None:
    program = cut(optc.capture(Embeds().eval(), (torch.ones(2, 3, dtype=torch.int64),)), 2)
    description, _, _ = PipelineBackend()._lower_stages(program, Target(threads=2, batch=2), tmp_path)
    write_pipeline(tmp_path, description)
    loaded = PipelineBackend().load(tmp_path, (PIPELINE,), Target(threads=2, batch=2))
    with pytest.raises(BackendError, match=r"rank 0 \(stage 0\) raised IndexError: index out of range"):
        loaded(np.full((2, 3), 10))
    loaded.close()


def test_ranks_do_not_outlive_the_process_that_started_them(stages: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from optc.lowering.pipeline import PipelineBackend;"
        "from optc.target import Target\n"
        "runner = PipelineBackend().load(Path(sys.argv[1]), ('pipeline.json',), Target(threads=2, batch=2))\n"
        "print(*runner.pids, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(stages)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        parent.kill()
    wait_for(lambda: not any(map(alive, pids)), 30.0)
