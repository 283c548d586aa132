from __future__ import annotations

import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn

from optc import Program, Target, capture
from optc.errors import BackendError
from optc.lowering.graph_file import write_graph
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
    assert caught.value.passing, "another compiler may be there next time"
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


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
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
    deadline = time.monotonic() + 60
    while processes(session) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes(session) == []
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in stderr
        assert not list(tmp_path.iterdir())


class Int8Pool(nn.Module):
    """A max pool as it stands between int8 layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.rounded(nn.functional.max_pool2d(self.rounded(x), 2))

    def rounded(self, x: Tensor) -> Tensor:
        qd, how = torch.ops.quantized_decomposed, (0.1, 0, -128, 127, torch.int8)
        return qd.dequantize_per_tensor(qd.quantize_per_tensor(x, *how), *how)


@pytest.mark.slow
def test_no_kernel_of_the_cpu_is_compiled_for_a_gpu(tmp_path: Path) -> None:
    write_graph(capture(Int8Pool(), (torch.randn(2, 3, 8, 8),)), tmp_path)
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from optc import Target
        from optc.lowering import inductor_compile

        class Show(inductor_compile.CustomGraphPass):
            def __call__(self, graph):
                print(*(node.target for node in graph.nodes))
                sys.exit()  # what follows needs a GPU

            def uuid(self):
                return None

        inductor_compile.inductor.post_grad_custom_post_pass = Show()
        read_graph = inductor_compile.read_graph
        inductor_compile.read_graph = lambda folder, batch, device: read_graph(folder, batch)
        inductor_compile.compile_package(Path(sys.argv[1]), Target("cuda", threads=1))
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert "_low_memory_max_pool" in done.stdout, done.stderr
    assert "qmaxpool2d" not in done.stdout
