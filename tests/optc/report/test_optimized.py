"""The report of ``optimize`` as a document, and what it has to say on a terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from optc.bench.choice import Outcome
from optc.machine import Machine, machine
from optc.report import optimized
from optc.report.document import Code, Document, Table
from optc.report.report import Report
from optc.report.terminal import render


def _parts(document: Document, kind: type[Table] | type[Code], title: str) -> list[Table | Code]:
    parts = [part for section in document.sections for part in section.parts]
    return [part for part in parts if isinstance(part, kind) and part.title == title]


def test_an_account_is_shown_with_what_was_chosen_and_why(document: Document) -> None:
    (account,) = _parts(document, Table, "What quant chose from")
    assert isinstance(account, Table)
    assert {"layer", "form", "chosen", "why"} <= set(account.header)


def test_pip_is_asked_for_packages_only(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_gpu() -> Machine:
        here = machine()
        return replace(here, packages={**here.packages, "cuda": "13.0", "nvidia-driver": "580.1"})

    monkeypatch.setattr(optimized, "machine", with_a_gpu)
    (code,) = _parts(optimized.optimized_document(report, Path("net"), ["optc"]), Code, "The same run")
    assert isinstance(code, Code)
    assert code.lines[0].startswith("pip install torch==")
    assert "cuda" not in code.lines[0]
    assert "nvidia" not in code.lines[0]


def test_a_candidate_that_failed_after_some_blocks_says_so(report: Report) -> None:
    assert report.measurement is not None
    results = [replace(each, error="out of cheese") if each.blocks else each for each in report.measurement.results]
    failed = replace(report, measurement=replace(report.measurement, results=tuple(results)))
    console = Console(record=True, width=200)
    console.print(render(failed, Path("net")))
    assert "! eager-fp32: does not count, it failed later: out of cheese" in console.export_text()
    document = optimized.optimized_document(failed, Path("net"), [])
    assert document.verdict == f"{report.model.name} was optimized, and failed when it was measured: out of cheese."


def test_what_was_measured_another_day_is_not_among_the_points(report: Report) -> None:
    assert report.measurement is not None
    (percentiles,) = {each.percentiles for each in report.measurement.results if each.name == "eager-fp32"}
    assert percentiles is not None
    measured = Outcome("here", False, "slower", "int8", percentiles.p50_ns / 1e6, 100, 1.0, "fuse,quant")
    recalled = replace(measured, backend="earlier", p50_ms=measured.p50_ms * 1.01)
    names = [point.name for point in optimized._points(replace(report, backends=(measured, recalled)))]
    assert "optc here fuse,quant" in names
    assert not any("earlier" in name for name in names)
