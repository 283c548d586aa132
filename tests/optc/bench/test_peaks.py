from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from optc.bench import peaks, peaks_cache
from optc.bench.peaks import Peaks, measure_peaks


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_SIDES", (128,))
    monkeypatch.setattr(peaks, "_SIZES", (2**14, 2**18))
    monkeypatch.setattr(peaks, "_ROUNDS", 1)
    monkeypatch.setattr(peaks, "_ROUND_SECONDS", 0.002)


@pytest.mark.usefixtures("quick")
def test_peaks_are_rates_by_type_and_by_size() -> None:
    found = measure_peaks(2, "now")
    assert {"float32", "bfloat16"} <= set(found.operations)
    assert all(rate > 1e6 for rate in found.operations.values())
    assert [size for size, _ in found.bandwidth] == [2**14, 2**18]
    assert found.bandwidth[1][1] > 1e6
    assert (found.threads, found.measured) == (2, "now")


@pytest.mark.usefixtures("quick")
def test_a_smaller_size_is_never_slower_than_a_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_SIZES", (1, 2, 3))
    monkeypatch.setattr(peaks, "_bandwidth", lambda size, threads: {1: 5.0, 2: 7.0, 3: 4.0}[size])
    assert measure_peaks(1).bandwidth == ((1, 7.0), (2, 7.0), (3, 4.0))


@pytest.mark.usefixtures("quick")
def test_peaks_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = peaks_cache.peaks(1)
    file = peaks_cache.peaks_file(1)
    assert file.is_relative_to(tmp_path / "optc" / "peaks")
    assert json.loads(file.read_text())["operations"] == first.operations
    file.write_text(json.dumps(json.loads(file.read_text()) | {"measured": "before", "disturbed": ""}))
    assert peaks_cache.peaks(1) == replace(first, measured="before", disturbed="")
    assert peaks_cache.peaks_file(2) != file


@pytest.mark.usefixtures("quick")
def test_disturbed_peaks_are_measured_again_and_the_higher_ones_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = peaks_cache.peaks_file(1)
    file.parent.mkdir(parents=True)
    known = Peaks(1, {"float32": 1e18, "bfloat16": 1.0}, ((2**14, 1e18), (2**18, 1.0)), "before", "other processes")
    file.write_text(json.dumps(asdict(known)))
    found = peaks_cache.peaks(1)
    assert found.measured != "before"
    assert found.operations["float32"] == found.bandwidth[0][1] == 1e18
    assert found.operations["bfloat16"] > 1.0
    assert found.bandwidth[1][1] > 1.0


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("text", ["", "[]", '{"threads": 1}', '{"threads": 1, "bandwidth": 3, "operations": {}}'])
def test_a_broken_file_is_measured_again(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = peaks_cache.peaks_file(1)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    found = peaks_cache.peaks(1)
    assert json.loads(file.read_text())["measured"] == found.measured != ""


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert isinstance(peaks_cache.peaks(1), Peaks)
