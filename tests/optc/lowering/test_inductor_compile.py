from __future__ import annotations

import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from optc import Program, Target
from optc.errors import BackendError
from optc.lowering.inductor import InductorBackend

TARGET = Target(threads=1)


def test_a_compiler_that_fails_is_named_with_what_it_said(
    cnn: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    compiler, folder = tmp_path / "broken-g++", tmp_path / "out"
    compiler.write_text(
        '#!/bin/sh\ncase "$1" in --version|-v|-dumpversion) exec g++ "$@";; esac\n'
        "echo In file included from model.cpp >&2\necho 'fatal error: no space left on device' >&2\nexit 1\n"
    )
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    folder.mkdir()
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(BackendError, match=r"broken-g\+\+ failed: fatal error: no space left on device") as caught:
        InductorBackend().lower(cnn, TARGET, folder)
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())
    assert capfd.readouterr() == ("", "")


def processes(session: int) -> list[str]:
    """Names of the living processes of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = entry.read_text().split("(", 1)[1].rsplit(") ", 1)
        except OSError:
            continue
        state, _parent, _group, owner, *_ = fields.split()
        if int(owner) == session and state != "Z":
            found.append(name)
    return found


def compiling_session(parent: int) -> int | None:
    """The session that the compiling process started by ``parent`` leads, once a C++ compiler runs in it."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if any(name == "cc1plus" for name in processes(int(child))):
            return int(child)
    return None


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_compilers_end_with_an_interrupted_lowering(how: signal.Signals, tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import signal, sys
        from pathlib import Path
        import torch
        from torch import nn
        import optc
        from optc.lowering.inductor import InductorBackend

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
        program = optc.capture(nn.Sequential(nn.Linear(8, 8), nn.Softmax(1)), (torch.randn(1, 8),))
        InductorBackend().lower(program, optc.Target(threads=1), Path(sys.argv[1]))
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while (session := compiling_session(process.pid)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert session is not None
        process.send_signal(how)
        _, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    while processes(session) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes(session) == []
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in stderr
        assert not list(tmp_path.iterdir())
