from __future__ import annotations

import io
import sys

import pytest
from rich.table import Table

from optc.cli.terminal import stdout


def test_letters_that_a_terminal_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    stdout().print("café → 3 µs")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().decode("latin-1") == "café \\u2192 3 µs\n"  # type: ignore[attr-defined]


def test_brackets_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("why")
    table.add_row("pip uninstall onnxruntime && pip install 'optc[gpu]'")
    stdout().print(table, "Written to out[v2][/x]")
    printed = capsys.readouterr().out
    assert "'optc[gpu]'" in printed
    assert "out[v2][/x]" in printed
