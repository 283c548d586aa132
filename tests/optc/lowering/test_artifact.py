from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import optc
from optc import Lowered, Program, Target
from optc.errors import ArtifactError
from optc.lowering import artifact as artifact_module
from optc.lowering.artifact import folder_written_whole, load_artifact, write_artifact
from optc.lowering.onnx_export import export_onnx
from optc.lowering.onnxruntime import OnnxRuntimeBackend
from optc.threads import most_threads

Change = Callable[[Path], None]
TARGET = Target(threads=1)


@dataclass(frozen=True)
class Made:
    """A lowered program and the folder its files are in."""

    program: Program
    lowered: Lowered
    files: Path

    def save(self, path: Path, precision: str = "float32") -> Path:
        return write_artifact(
            path, self.files, self.lowered, self.program, "onnxruntime", {"precision": precision}, TARGET
        )


@pytest.fixture(scope="session")
def made(captured_cnn: Program, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("lowered")
    return Made(captured_cnn, OnnxRuntimeBackend().lower(captured_cnn, TARGET, folder), folder)


@pytest.fixture
def saved(made: Made, tmp_path: Path) -> Path:
    return made.save(tmp_path / "artifact")


def edit(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_saved_artifact_loads_and_computes_the_same(cnn: Program, saved: Path) -> None:
    x = torch.randn(5, 3, 16, 16)
    np.testing.assert_allclose(optc.load(saved)(x.numpy())[0], cnn.run(x)[0].numpy(), rtol=1e-4, atol=1e-5)
    assert sorted(file.name for file in saved.iterdir()) == ["manifest.json", "model.onnx", "run.py"]
    artifact = load_artifact(saved)
    assert artifact.bytes == (saved / "model.onnx").stat().st_size
    assert [array.shape for array in artifact.example_query(3)] == [(3, 3, 16, 16)]
    assert artifact.manifest.model["name"] == "Cnn"


def test_only_what_concerns_the_folder_is_called_an_error_of_writing(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), folder_written_whole(tmp_path / "a" / "out"):
        raise ConnectionError("not of the folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"cannot write '.*out'"), folder_written_whole(tmp_path / "file" / "out"):
        pass


def test_it_can_be_moved(saved: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    saved.rename(moved)
    assert optc.load(moved)(np.zeros((1, 3, 16, 16), np.float32))[0].shape == (1, 10)


def test_the_run_script_needs_numpy_and_onnxruntime_alone(cnn: Program, saved: Path, tmp_path: Path) -> None:
    x = torch.randn(3, 3, 16, 16)
    np.save(tmp_path / "x.npy", x.numpy())
    code = textwrap.dedent(
        """
        import importlib.abc, runpy, sys

        class Refuse(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "optc", "onnx", "onnxscript", "PIL", "pydantic", "torchvision"):
                    raise ImportError(f"{name} is out of bounds")

        sys.meta_path.insert(0, Refuse())
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        """
    )
    command = [sys.executable, "-I", "-c", code, str(saved / "run.py")]
    bare = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert bare.stdout.strip() == "output shape: (1, 10)"
    fed = subprocess.run([*command, "x.npy"], capture_output=True, text=True, check=True, cwd=tmp_path)
    best = [line.split(": ", 1)[1].split(":")[0] for line in fed.stdout.splitlines() if line.startswith("top 5")]
    assert best == [str(int(row)) for row in cnn.run(x)[0].argmax(1)]
    assert bare.stderr == fed.stderr == ""


def truncate(path: Path) -> None:
    data = (path / "model.onnx").read_bytes()
    (path / "model.onnx").unlink()
    (path / "model.onnx").write_bytes(data[:-100])


def alter(path: Path) -> None:
    data = bytearray((path / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "model.onnx").unlink()
    (path / "model.onnx").write_bytes(data)


def link(path: Path) -> None:
    (path / "model.onnx").rename(path.parent / "outside.onnx")
    (path / "model.onnx").symlink_to(path.parent / "outside.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, r"model\.onnx has \d+ bytes, its manifest says \d+"),
        (alter, r"model\.onnx was altered"),
        (link, r"model\.onnx is missing"),
        (lambda path: (path / "model.onnx").unlink(), r"model\.onnx is missing"),
        (lambda path: (path / "run.py").write_text("print('other')"), r"run\.py"),
        (lambda path: (path / "manifest.json").unlink(), "no optc artifact"),
        (lambda path: (path / "manifest.json").write_text("{"), "not valid"),
        (lambda path: (path / "manifest.json").write_text("[]"), "not valid"),
        (lambda path: (path / "manifest.json").write_text("[" * 100_000), "not valid"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"), "cannot read"),
        (lambda path: edit(path, lambda m: m.update(format_version=99)), "format version 99.*upgrade optc"),
        (lambda path: edit(path, lambda m: m.update(surprise=1)), "surprise"),
        (lambda path: edit(path, lambda m: m.pop("backend")), "backend"),
        (lambda path: edit(path, lambda m: m.update(load=["other.onnx"])), r"other\.onnx"),
        (lambda path: edit(path, lambda m: m.update(load=[])), "no file to load"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(saved: Path, change: Change, message: str) -> None:
    change(saved)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_artifact(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", "a/../../outside.onnx", "..\\outside.onnx", ""])
def test_file_names_may_not_lead_out_of_the_folder(saved: Path, name: str) -> None:
    (saved.parent / "outside.onnx").write_bytes((saved / "model.onnx").read_bytes())

    def redirect(manifest: dict[str, object]) -> None:
        files = manifest["files"]
        assert isinstance(files, dict)
        files[name] = files.pop("model.onnx")
        manifest["load"] = [name]

    edit(saved, redirect)
    with pytest.raises(ArtifactError, match="leads out of the folder"):
        load_artifact(saved)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no folder"):
        load_artifact(tmp_path / "nothing")


def test_files_beside_the_artifacts_own_are_left_alone(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    assert load_artifact(saved).manifest.load == ("model.onnx",)


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(kind: str, made: Made, tmp_path: Path) -> None:
    path = tmp_path / "taken"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"exists — choose another -o"):
        made.save(path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["taken"]


def test_an_artifact_is_refused_where_what_it_was_compiled_for_is_missing(made: Made, tmp_path: Path) -> None:
    compiled = Lowered(made.lowered.files, required_isa=("fma", "avx512_of_the_future"))
    saved = write_artifact(
        tmp_path / "artifact", made.files, compiled, made.program, "onnxruntime", {"precision": "float32"}, TARGET
    )
    with pytest.raises(ArtifactError, match=r"with fma, avx512_of_the_future; this CPU, .*, lacks avx512_of"):
        load_artifact(saved)


def test_an_int8_artifact_is_refused_where_its_instructions_are_missing(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_module, "isa", lambda: ("avx2", "avx512_vnni", "amx_int8"))
    monkeypatch.setattr(artifact_module, "cpu_flags", lambda: frozenset({"avx2", "avx512_vnni", "amx_int8"}))
    int8 = made.save(tmp_path / "int8", "int8 (4 of 4 layers)")
    floating = made.save(tmp_path / "float")
    assert load_artifact(int8).manifest.required_isa == ("avx512_vnni|avx_vnni|amx_int8",)
    monkeypatch.setattr(artifact_module, "cpu_flags", lambda: frozenset({"avx2", "avx_vnni"}))
    load_artifact(int8)
    monkeypatch.setattr(artifact_module, "cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(ArtifactError, match=r"; this CPU, .*, lacks avx512_vnni or avx_vnni or amx_int8"):
        load_artifact(int8)
    load_artifact(floating)


WRITER = """
import resource, signal, sys
from pathlib import Path
import torch
from optc import Lowered, Target, capture
from optc.errors import ArtifactError
from optc.lowering.artifact import write_artifact

path, scratch = Path(sys.argv[1]), Path(sys.argv[2])
program = capture(torch.nn.ReLU(), (torch.randn(2, 4),))
"""


def python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )


WRITE = 'write_artifact(path, scratch, Lowered(("model.onnx",)), program, "onnxruntime", {}, Target(threads=1))'


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path: Path) -> None:
    disk, scratch = tmp_path / "disk", tmp_path / "scratch"
    disk.mkdir()
    scratch.mkdir()
    (scratch / "model.onnx").write_bytes(bytes(4 << 20))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a small file system here")
    try:
        code = f"{WRITER}\ntry:\n    {WRITE}\nexcept ArtifactError as error:\n    print(error)"
        result = python(code, disk / "new" / "artifact", scratch)
        assert "No space left on device; nothing was written — free some space" in result.stdout, result.stderr
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_size_limit_leaves_nothing_behind(tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    (scratch / "model.onnx").write_bytes(bytes(100))
    limit = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))"
    code = f"{WRITER}\n{limit}\ntry:\n    {WRITE}\nexcept ArtifactError as error:\n    print(error)"
    result = python(code, out / "artifact", scratch)
    assert "File too large; nothing was written" in result.stdout, result.stderr
    assert not out.exists()


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "out"
    scratch.mkdir()
    with (scratch / "model.onnx").open("wb") as file:
        file.truncate(1 << 40)  # sparse: linked at once, hashed for minutes
    code = f"{WRITER}\nprint('ready', flush=True)\n{WRITE}"
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(out / "artifact"), str(scratch)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 30
    while not list(out.glob(".artifact-*/model.onnx")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(out.glob(".artifact-*/model.onnx"))
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr
    assert not out.exists()


def test_weights_beyond_one_file_travel_along(block: Program, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    files, _ = export_onnx(block, scratch / "model.onnx", external_data_bytes=1000)
    saved = write_artifact(tmp_path / "artifact", scratch, Lowered(files), block, "onnxruntime", {}, TARGET)
    assert load_artifact(saved).manifest.load == ("model.onnx", "model.onnx.data")
    x = torch.randn(2, 3, 16, 16)
    np.testing.assert_allclose(optc.load(saved)(x.numpy())[0], block.run(x)[0].numpy(), rtol=1e-4, atol=1e-5)
    (saved / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data is missing"):
        load_artifact(saved)


def test_a_backend_without_a_run_script_gets_none(made: Made, tmp_path: Path) -> None:
    saved = write_artifact(
        tmp_path / "artifact", made.files, Lowered(made.lowered.files), made.program, "onnxruntime", {}, TARGET
    )
    assert sorted(file.name for file in saved.iterdir()) == ["manifest.json", "model.onnx"]


def test_weights_are_not_written_twice(made: Made, saved: Path) -> None:
    assert (saved / "model.onnx").samefile(made.files / "model.onnx")


def test_integers_of_an_example_query_may_be_indices(tmp_path: Path) -> None:
    tokens = torch.tensor([[0, 1, 2], [2, 1, 0]])
    made = optc.optimize(torch.nn.Embedding(8, 4).eval(), tokens, "fuse", backend="eager", measure=False)
    artifact = load_artifact(made.save(tmp_path / "embedding"))
    (query,) = artifact.example_query(64)
    assert query.dtype == np.int64
    assert query.min() == 0
    assert artifact.runner()(query)[0].shape == (64, 3, 4)


@pytest.mark.usefixtures("uncompiled", "briefly")
def test_inputs_in_bfloat16_are_measured_and_run() -> None:
    model, x = torch.nn.Linear(8, 8).bfloat16().eval(), torch.randn(2, 8).bfloat16()
    made = optc.optimize(model, x, "fuse", measure=False)
    assert made.report.backends[0].chosen
    torch.testing.assert_close(made(x), model(x).detach(), rtol=1e-2, atol=1e-2)


def test_the_run_script_refuses_a_cpu_that_lacks_int8_instructions(saved: Path) -> None:
    edit(saved, lambda manifest: manifest.update(required_isa=["avx512_of_the_future|fpu", "avx3|avx4"]))
    done = subprocess.run([sys.executable, "-I", saved / "run.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "the model was made for a CPU with avx3 or avx4: optimize it again here\n"


class LooksUp(nn.Module):
    """Integers in, a table's rows and their number out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(x).mean(1)


def test_the_run_script_takes_the_models_types_and_says_what_does_not_fit(tmp_path: Path) -> None:
    options: Any = {"backend": "onnxruntime", "measure": False, "target": TARGET}
    saved = optc.optimize(LooksUp(), torch.randint(0, 7, (2, 5)), "fuse", **options).save(tmp_path / "made")
    np.save(tmp_path / "fits.npy", np.ones((3, 5), np.int32))
    np.save(tmp_path / "long.npy", np.ones((3, 6), np.int64))
    command = [sys.executable, "-I", saved / "run.py"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "output shape: (1, 3)\n"
    fits = subprocess.run([*command, tmp_path / "fits.npy"], capture_output=True, text=True)
    assert fits.stdout.startswith("output shape: (3, 3)\ntop 5: "), fits.stderr
    long = subprocess.run([*command, tmp_path / "long.npy"], capture_output=True, text=True)
    assert long.stderr == "input x has the shape (3, 6), the model takes (3, 5)\n"
    np.save(tmp_path / "number.npy", np.int64(1))
    number = subprocess.run([*command, tmp_path / "number.npy"], capture_output=True, text=True)
    assert number.stderr == "input x has the shape (), the model takes (1, 5)\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_an_example_query_has_a_type_that_numpy_has(dtype: str, saved: Path) -> None:
    edit(saved, lambda manifest: manifest["inputs"][0].update(dtype=dtype))
    assert load_artifact(saved).example_query()[0].dtype == np.float32


def test_a_target_of_a_newer_optc_is_one_line(saved: Path) -> None:
    edit(saved, lambda manifest: manifest["target"].update(sockets=2))
    with pytest.raises(ArtifactError, match=r"was made for a target not known here: .*sockets"):
        load_artifact(saved).target()


def test_no_more_threads_are_used_than_there_are(saved: Path) -> None:
    edit(saved, lambda manifest: manifest["target"].update(threads=64))
    assert load_artifact(saved).target().threads == most_threads()
