"""The comparison with peers: real tools on a small model, and what follows from their numbers."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from optc import Runner, Target
from optc.bench.measure import measure
from optc.bench.results import Candidate, Measurement

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def peers() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("peers")
    sys.path.remove(str(BENCHMARKS))


def run(names: list[str], results: Path) -> dict[str, Any]:
    """What the script wrote of one row."""
    task = ["--models", "test_resnet", "--batch", "2", "--images", "8", "--blocks", "2", "--results", results]
    command = [sys.executable, BENCHMARKS / "peers.py", *task, "--peers", ",".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=results)
    assert done.returncode in (0, 1), done.stderr  # 1: the claim did not hold, which here says nothing
    (path,) = (results / "peers").glob("test_resnet-batch-2-*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
def test_tools_are_made_measured_and_compared(tmp_path: Path) -> None:
    names = ["eager fp32", "onnxruntime int8"]
    row = run(names, tmp_path)
    assert row["out"] == {}
    for result in row["measurement"]["results"]:
        assert len(result["blocks"]) == 2
        assert result["blocks"][0]["latencies_ns"]
    assert (row["sqnr_db"]["eager fp32"] or math.inf) > 120  # the reference itself; null: not a bit off
    assert 10 < row["sqnr_db"]["onnxruntime int8"] < 80
    made = row["productions"]["onnxruntime int8"]
    assert made["seconds"] > made["own_seconds"] > 0
    assert made["peak_bytes"] > 100e6
    assert row["best_peer"] in names
    text = next((tmp_path / "peers").glob("test_resnet-batch-2-*.md")).read_text()
    assert all(f"| {name} |" in text for name in names)
    assert (tmp_path / "peers.md").read_text().startswith("## peers: DID NOT HOLD")  # optc was not among them


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_tool_runs_or_is_listed_with_its_reason(tmp_path: Path) -> None:
    names = ["torch.compile bf16", "torchao int8", "torchao int8 bf16", "onnxruntime int8 per tensor"]
    names += ["openvino nncf int8", "openvino nncf int8 mixed", "olive int8", "optc auto"]
    row = run(names, tmp_path)
    bf16 = dict.fromkeys(("torch.compile bf16", "torchao int8 bf16"), "bfloat16")
    optional = {"openvino nncf int8": "nncf", "openvino nncf int8 mixed": "ReLU", "olive int8": "pip", **bf16}
    assert all(optional.get(name, "nothing") in why for name, why in row["out"].items()), row["out"]
    assert set(row["p50_ms"]) | set(row["out"]) == set(names)
    assert row["productions"]["optc auto"]["details"]["backends"][0]["chosen"]
    assert row["ratios"]["optc auto"]["low"] <= row["ratios"]["optc auto"]["value"]


def test_a_tool_that_fails_is_listed_with_its_reason(peers: ModuleType, tmp_path: Path) -> None:
    made = peers.produce("onnxruntime fp32", peers.Task("no_such_model", 1, threads=1, images=1), tmp_path / "0")
    assert "no_such_model" in made.error
    assert made.seconds > 0


class Constant(Runner):
    """Returns what it was given, after some arithmetic whose amount is its latency."""

    provider, precision = "numpy", "float32"

    def __init__(self, side: int) -> None:
        self.matrix = np.ones((side, side), np.float32)

    def __call__(self, *inputs: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
        self.matrix @ self.matrix
        return inputs


@pytest.fixture(scope="module")
def measured() -> Measurement:
    """Three candidates, each clearly slower than the one before."""
    sides = {"openvino nncf int8": 32, "optc auto": 256, "eager fp32": 1024}
    candidates = [Candidate(name, "", False, lambda side=side: Constant(side)) for name, side in sides.items()]
    query = [(np.ones((1, 4), np.float32),)]
    return measure(candidates, query, Target(threads=1), blocks=2, block_seconds=0.02)


def test_the_best_peer_is_the_fastest_that_computes_the_same(peers: ModuleType, measured: Measurement) -> None:
    task = peers.Task("test_resnet", 1, threads=1, images=4)
    made = {result.name: peers.Production() for result in measured.results}
    sound = peers.row(task, made, dict.fromkeys(made, 40.0), measured)
    assert sound["best_peer"] == "openvino nncf int8"
    assert sound["ratios"]["optc auto"]["value"] > 1

    wrong = peers.row(task, made, {**dict.fromkeys(made, 40.0), "openvino nncf int8": 3.0}, measured)
    assert wrong["best_peer"] == "eager fp32"
    assert wrong["ratios"]["optc auto"]["value"] < 1
    assert "output differs: 3.0 dB" in wrong["out"]["openvino nncf int8"]
    assert "output differs: 3.0 dB" in peers.row_markdown(wrong)


def test_the_finalists_decide_in_a_measurement_of_their_own(peers: ModuleType, measured: Measurement) -> None:
    task = peers.Task("test_resnet", 1, threads=1, images=4)
    made = {result.name: peers.Production() for result in measured.results}
    row = peers.row(task, made, dict.fromkeys(made, 40.0), measured)
    assert "again" not in peers.row_markdown(row)
    assert peers.finalists(row) == ["optc auto", "openvino nncf int8"]
    p50 = row["p50_ms"]
    close = {**row, "p50_ms": {**p50, "eager fp32": 1.05 * p50["openvino nncf int8"]}}
    assert peers.finalists(close) == ["optc auto", "openvino nncf int8", "eager fp32"]
    row["measurement"] |= {"interleaved": False, "sequential_reason": "they are large"}
    assert peers.finalists(close) == ["optc auto", "openvino nncf int8"], "of large models two fit"
    assert peers.finalists({**close, "out": {"openvino nncf int8": "its output differs"}})[1:] == ["eager fp32"]
    assert not peers.finalists({**row, "ratios": {}}), "optc made nothing"

    sides = {"openvino nncf int8": 512, "optc auto": 64}  # now the other way round
    two = [Candidate(name, "", False, lambda side=side: Constant(side)) for name, side in sides.items()]
    query = [(np.ones((1, 4), np.float32),)]
    again = measure(two, query, Target(threads=1), blocks=2, block_seconds=0.02, together=True)
    decided = peers.with_finalists_again(row, measured, again)
    assert row["ratios"]["optc auto"]["value"] > 1 > decided["ratios"]["optc auto"]["value"]
    assert decided["p50_ms"]["optc auto"] == again["optc auto"].percentiles.p50_ns / 1e6
    assert decided["p50_ms"]["eager fp32"] == row["p50_ms"]["eager fp32"]
    assert decided["ratios"]["eager fp32"] == row["ratios"]["eager fp32"]
    assert "openvino nncf int8 and optc auto were measured again, in turns" in peers.row_markdown(decided)
    assert json.dumps(decided["again"])

    gone = [Candidate(name, "", False, lambda: Constant(-1)) for name in sides]
    failed = measure(gone, query, Target(threads=1), blocks=2, block_seconds=0.02, together=True)
    undecided = peers.with_finalists_again(row, measured, failed)
    assert undecided["ratios"] == row["ratios"]
    assert "- optc auto was not measured again: ValueError" in peers.row_markdown(undecided)

    sides = {"openvino nncf int8": 512, "eager fp32": 64, "optc auto": 128}
    three = [Candidate(name, "", False, lambda side=side: Constant(side)) for name, side in sides.items()]
    again = measure(three, query, Target(threads=1), blocks=2, block_seconds=0.02, together=True)
    other = peers.with_finalists_again(row, measured, again)
    assert other["best_peer"] == "eager fp32"
    assert other["ratios"]["openvino nncf int8"]["value"] > other["ratios"]["optc auto"]["value"] > 1


def test_optc_is_out_where_its_own_outputs_differ(peers: ModuleType, measured: Measurement) -> None:
    task = peers.Task("test_resnet", 1, threads=1, images=4)
    made = {result.name: peers.Production() for result in measured.results}
    row = peers.row(task, made, {**dict.fromkeys(made, 40.0), "optc auto": float("nan")}, measured)
    assert "optc auto" in row["out"]
    assert not peers.summary([row], 1).held
    assert "test_resnet batch 1" in peers.summary([row], 1).finding


@pytest.mark.parametrize(("ratio", "held"), [(0.8, True), (0.92, False), (1.2, False)])
def test_alexnet_at_batch_1_has_a_limit_of_its_own(peers: ModuleType, ratio: float, held: bool) -> None:
    row = {
        "model": "alexnet",
        "batch": 1,
        "recipes": peers.RECIPES,
        "measurement": {"results": [{"name": "eager fp32", "warnings": ["it was unsteady"]}]},
        "machine": {"cpu": "a CPU", "isa": None},
        "best_peer": "eager fp32",
        "p50_ms": {"eager fp32": 1.0, "optc auto": ratio},
        "out": {},
        "ratios": {"optc auto": {"value": ratio, "low": ratio, "high": ratio}},
        "productions": {name: {"seconds": 1.0} for name in ("eager fp32", "optc auto")},
        "sqnr_db": {"eager fp32": None, "optc auto": 30.0},
    }
    assert peers.summary([row], 1).held is held
    assert peers.summary([{**row, "batch": 16}], 1).held is (ratio <= 0.95)
    assert not peers.summary([row], 2).held, "a row is still to be measured"
    elsewhere = {**row, "machine": {"cpu": "another CPU", "isa": ["avx2"]}}
    both = peers.summary([row, elsewhere], 2)
    assert not both.held, "two machines are no two rows wanted"
    assert both.finding.startswith(f"geometric mean {ratio:.3f} over 2 rows of 1 of 2 models and batches")
    assert "alexnet batch 1 on avx2: eager fp32: it was unsteady" in both.notes
    assert ("alexnet batch 1 on avx2" in both.finding) is not held
    assert both.measured_on == "2 machines, see its table"
    assert not peers.summary([row], 1).measured_on
    missed = "none missed" if held else "missed: alexnet batch 1"
    assert f"another CPU (avx2): geometric mean {ratio:.3f} over 1 rows, {missed}" in both.notes


def test_rows_measured_before_count_where_the_versions_are_these(
    peers: ModuleType, measured: Measurement, tmp_path: Path
) -> None:
    def known(model: str, batch: int, **machine: Any) -> None:
        task = peers.Task(model, batch, threads=1, images=4)
        made = {result.name: peers.Production() for result in measured.results}
        row = peers.row(task, made, dict.fromkeys(made, 40.0), measured)
        row["machine"].update(machine)
        (tmp_path / f"{model}-batch-{batch}-{len(list(tmp_path.iterdir()))}.json").write_text(json.dumps(row))

    known("test_resnet", 1)
    known("resnet50", 16, load_average=7.0)
    known("resnet50", 1)
    known("alexnet", 16)
    known("alexnet", 1, packages={"optc": "0.0.1"})
    known("vit_base_patch16_224", 1, isa=["avx2", "of_another_cpu"])
    known("vit_base_patch16_224", 1, isa=["avx2"])
    rows = peers.known_rows(tmp_path)
    found = [(row["model"], row["batch"]) for row in rows]
    assert found == [
        ("alexnet", 16),
        ("resnet50", 1),
        ("resnet50", 16),
        ("vit_base_patch16_224", 1),
        ("vit_base_patch16_224", 1),
        ("test_resnet", 1),
    ]
    table = peers.summary(rows, 12).table
    assert [table[number]["on"].split()[-1] for number in (3, 4)] == ["(avx2)", "(of_another_cpu)"]


def test_rows_of_earlier_recipes_are_counted_by_themselves(peers: ModuleType, measured: Measurement) -> None:
    task = peers.Task("test_resnet", 1, threads=1, images=4)
    made = {result.name: peers.Production() for result in measured.results}
    row = peers.row(task, made, dict.fromkeys(made, 40.0), measured)  # optc is slower
    earlier = {**row, "recipes": peers.RECIPES - 1}
    alone = peers.summary([row], 1)
    both = peers.summary([earlier, row], 1)
    assert both.finding.startswith(alone.finding)
    assert both.finding.endswith("over 1 rows, 1 missed")
    assert len(both.table) == len(alone.table) == 1
    assert any(note.startswith("Earlier recipes, missed: test_resnet batch 1: ") for note in both.notes)
    assert not peers.summary([earlier], 1).held


def test_outputs_are_judged_on_as_many_images_at_each_batch_size(peers: ModuleType) -> None:
    for batch in (1, 16):
        judged = peers.Task("test_resnet", batch, threads=1, images=16).judged
        assert {len(images) for images in judged} == {batch}
        assert sum(map(len, judged)) == 32


def test_signal_to_noise(peers: ModuleType) -> None:
    reference = [np.full((2, 3), 10.0, np.float32)]
    assert peers.sqnr_db(reference, reference) == float("inf")
    assert peers.sqnr_db(reference, [reference[0] + 1]) == pytest.approx(20)
