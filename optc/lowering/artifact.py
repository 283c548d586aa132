"""Artifacts: folders with a runtime's own files, ``manifest.json`` and ``run.py``, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import optc
from optc.errors import ArtifactError
from optc.lowering.backend import Array, Backend, Lowered, Runner
from optc.lowering.inputs import described
from optc.lowering.manifest import NAME, Manifest, TensorEntry, check_files, file_entry, read_manifest
from optc.machine import INT8_FLAGS, cpu_flags, cpu_name, isa, machine
from optc.paths import encodable
from optc.plugins.registry import registry
from optc.target import Target
from optc.threads import most_threads

if TYPE_CHECKING:
    from optc.program import Program

RUN_SCRIPT = "run.py"


@dataclass(frozen=True)
class Artifact:
    """An artifact folder whose files have been checked against its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def bytes(self) -> int:
        """Size of the runtime's files."""
        return sum(self.manifest.files[name].bytes for name in self.manifest.load)

    @property
    def precision(self) -> str:
        """What its runner said it computes in when it was made."""
        return str(self.manifest.report.get("precision", ""))

    def runner(self, target: Target | None = None) -> Runner:
        """Load the runtime's files, for :meth:`target`.

        Raises:
            OptcError: the backend is not installed or refuses the files.
        """
        backend: Backend = registry().load("backend", self.manifest.backend)()
        return backend.load(self.folder, self.manifest.load, self.target(target))

    def target(self, given: Target | None = None) -> Target:
        """What it was made for, with as many threads of those as there are here; or what is given, with the backend's
        options that it was made for where it has none.

        Raises:
            ArtifactError: a newer optc made it for something that this one does not know.
        """
        try:
            made_for = Target(**self.manifest.target)
        except TypeError as error:
            raise ArtifactError(
                f"'{self.folder}' was made for a target not known here: {error}", "upgrade optc"
            ) from error
        if given is None:
            return replace(made_for, threads=min(made_for.threads, most_threads()))
        return replace(given, options={**made_for.options, **given.options})

    def example_query(self, batch: int = 1, seed: int = 0) -> tuple[Array, ...]:
        """Seeded normal noise of the inputs' shapes, ``batch`` where the first dimension may vary.

        Integers are not negative, as they may be indices; what numpy has no type for is float32.
        """
        generator = np.random.default_rng(seed)
        shapes = [[batch if size is None else size for size in entry.shape] for entry in self.manifest.inputs]
        noise = [generator.standard_normal(shape) for shape in shapes]
        names = [entry.dtype for entry in self.manifest.inputs]
        types = [np.dtype("float32" if name.startswith(("bfloat", "float8")) else name) for name in names]
        return tuple(
            (values if np.issubdtype(dtype, np.floating) else np.abs(values)).astype(dtype)
            for values, dtype in zip(noise, types, strict=True)
        )


def load_artifact(path: str | Path) -> Artifact:
    """Open an artifact: its manifest is validated and every file's hash compared; nothing in it is executed.

    Raises:
        ArtifactError: it is no artifact, was altered, was made by a newer optc, or needs instructions this CPU lacks.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder '{folder}'", "give a folder that 'optc optimize' wrote")
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    _check_machine(folder, manifest)
    return Artifact(folder, manifest)


def load(path: str | Path) -> Runner:
    """Open an artifact and load its runner; raises as :func:`load_artifact` and :meth:`Artifact.runner` do.

    No Python in it is run. But what ``inductor`` and ``tensorrt`` compiled is machine code: open such only from people
    you trust.
    """
    return load_artifact(path).runner()


def write_artifact(
    path: Path,
    source: Path,
    lowered: Lowered,
    program: Program,
    backend: str,
    report: Mapping[str, Any],
    target: Target,
) -> Path:
    """Write an artifact folder atomically: a folder beside it is filled, then renamed.

    Args:
        path: the folder to write; must not exist.
        source: where the files ``lowered`` names are; they are linked where possible, else copied.
        report: JSON-ready.

    Raises:
        ArtifactError: ``path`` exists or cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise ArtifactError(f"output folder '{path}' exists", "choose another -o or remove it")
    with _told(path), folder_written_whole(path) as temporary:
        for name in lowered.files:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source / name, temporary / name)
        if lowered.run_script:
            (temporary / RUN_SCRIPT).write_text(lowered.run_script, encoding="utf-8")
        written = sorted(file for file in temporary.rglob("*") if file.is_file())
        files = {file.relative_to(temporary).as_posix(): file_entry(file) for file in written}
        manifest = Manifest(
            optc_version=optc.__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            backend=backend,
            load=lowered.files,
            files=files,
            inputs=tuple(TensorEntry(**each) for each in described(program)),
            model={key: _encodable(value) for key, value in asdict(program.info).items()},
            target=asdict(target),
            machine=asdict(machine()),
            required_isa=_required_isa(lowered, str(report.get("precision", "")), target),
            report=dict(report),
        )
        (temporary / NAME).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return path


def _encodable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_encodable(item) for item in value]
    return encodable(value) if isinstance(value, str) else value


@contextmanager
def folder_written_whole(path: Path) -> Iterator[Path]:
    """A folder that becomes ``path`` if the block succeeds, and goes, with the parents made for it, if it does not.

    Raises:
        ArtifactError: there can be no such folder; what the block raises is left as it is.
    """
    parents = [parent for parent in path.parents if not parent.exists()]
    temporary = None
    try:
        with _told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        yield temporary
        with _told(path):
            temporary.chmod(0o755)
            temporary.rename(path)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in parents:
            with suppress(OSError):  # a parent that others have put something into stays
                parent.rmdir()
        raise


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"cannot write '{path}': {error.strerror or error}; nothing was written",
            "free some space or choose another -o",
        ) from error


def _required_isa(lowered: Lowered, precision: str, target: Target) -> tuple[str, ...]:
    """What the files were compiled for; and for an int8 artifact that was checked with one, any of ``INT8_FLAGS``."""
    exact = target.device == "cpu" and "int8" in precision and not set(INT8_FLAGS).isdisjoint(isa() or ())
    return (*lowered.required_isa, "|".join(INT8_FLAGS)) if exact else lowered.required_isa


def _check_machine(folder: Path, manifest: Manifest) -> None:
    """Refuse an artifact on a CPU that lacks what its code was compiled for, or the int8 kernels it was checked with.

    Compiled code would end the process at the first unknown instruction. Without VNNI or AMX, int8 products are summed
    in saturating 16-bit steps: the outputs differ, not only the speed.
    """
    present = cpu_flags() or frozenset()
    missing = [flags for flags in manifest.required_isa if present.isdisjoint(flags.split("|"))]
    if missing:
        made_on = manifest.machine.get("cpu", "another CPU")
        raise ArtifactError(
            f"'{folder}' was made for {made_on} with {_readable(manifest.required_isa)}; this CPU, {cpu_name()}, lacks"
            f" {_readable(missing)}",
            "optimize the model again on this machine",
        )


def _readable(flags: Iterable[str]) -> str:
    return ", ".join(each.replace("|", " or ") for each in flags)


def _link_or_copy(source: Path, destination: Path) -> None:
    """Hard-link within one file system, so gigabytes of weights are not written twice; copy across."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)
