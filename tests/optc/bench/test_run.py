from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from optc import Runner, Target
from optc.bench.measure import measure
from optc.bench.results import Candidate
from optc.bench.run import FORMAT_VERSION, read_run, run_document
from optc.bench.surroundings import surroundings
from optc.errors import MeasurementError


class _Quick(Runner):
    provider, precision = "test", "float32"

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        return inputs


def _refuse() -> Runner:
    raise RuntimeError("no such kernel")


@pytest.fixture(scope="module")
def document() -> dict[str, object]:
    query = ((np.ones((1, 3), np.float32),),)
    candidates = [Candidate("quick", "", False, _Quick, 0, query), Candidate("refused", "", False, _refuse, 0, query)]
    target = Target(threads=1)
    measured = measure(candidates, [], target, blocks=2, block_seconds=0.005)
    return json.loads(json.dumps(run_document(measured, surroundings(target)), allow_nan=False))


def test_a_run_comes_back_as_it_was_measured(document: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    told = {"warnings": ["it was hot"], "sequential_reason": "they are large"}
    path.write_text(json.dumps({**document, **told}))
    run = read_run(path)
    assert run.warnings == ("it was hot", "measured one after another, not in turns: they are large")
    quick, refused = run.results
    assert [list(block.latencies_ns) for block in quick.blocks] == [
        block["latencies_ns"]
        for block in document["results"][0]["blocks"]  # type: ignore[index]
    ]
    assert quick.percentiles is not None
    assert quick.blocks[0].loadgen.scenario == "SingleStream"
    assert refused.error == "RuntimeError: no such kernel"
    assert refused.percentiles is None
    assert run.surroundings == surroundings(Target(threads=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "else"}, "is no measured run"),
        ({"format_version": FORMAT_VERSION + 1}, "newer optc"),
        ({"format_version": None}, "its format_version is None"),
        ({"results": [{"name": "a"}]}, "is not valid: KeyError"),
        ({"surroundings": None}, "is not valid"),
    ],
)
def test_what_is_no_run_is_refused(
    document: dict[str, object], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**document, **change}))
    with pytest.raises(MeasurementError, match=message):
        read_run(path)


def test_a_file_that_is_missing_or_no_json_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="cannot read"):
        read_run(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(MeasurementError, match="optc profile --json"):
        read_run(tmp_path / "text.json")
