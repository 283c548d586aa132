"""``manifest.json``: what an artifact is, how it was made, what was proven and measured, and the hash of every file."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from optc.errors import ArtifactError

SCHEMA_VERSION = 1
NAME = "manifest.json"
_MOST_VALUES = 2**30
"""Of one sample: more would not fit into memory."""
_Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]


class FileEntry(BaseModel):
    """A file of the artifact: its size in bytes and SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TensorEntry(BaseModel):
    """An input: its name, shape (``None`` where it may vary) and dtype as numpy spells it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: tuple[Annotated[int, Field(strict=True, ge=0)] | None, ...]
    dtype: str

    @field_validator("shape")
    @classmethod
    def _fits_into_memory(cls, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        if math.prod(1 if size is None else size for size in shape[1:]) > _MOST_VALUES:
            raise ValueError("no memory holds so many values")
        return shape

    @field_validator("dtype")
    @classmethod
    def _is_a_type_of_numbers(cls, dtype: str) -> str:
        try:
            known = dtype.startswith(("bfloat", "float8")) or np.dtype(dtype).kind in "biufc"
        except TypeError:
            known = False
        if not known:
            raise ValueError(f"{dtype!r} is no type of numbers")
        return dtype


class _Preprocessing(BaseModel):
    """What must hold of the fields of :class:`~optc.program.Preprocessing`."""

    model_config = ConfigDict(extra="forbid")

    input_size: tuple[_Count, _Count, _Count] = (3, 224, 224)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = ""
    resize: _Count = 1


class _Model(BaseModel):
    """What must hold of the fields of :class:`~optc.program.ModelInfo`."""

    name: str = ""
    weights: str = ""
    preprocessing: _Preprocessing


class _Target(BaseModel):
    """What must hold of the fields of :class:`~optc.target.Target`."""

    device: Literal["cpu", "cuda"] = "cpu"
    threads: _Count = 1
    batch: _Count = 1
    allow_fallback: bool = False
    options: dict[str, dict[str, Any]] = {}


class _Accuracy(BaseModel):
    """What must hold of :class:`~optc.report.report.Accuracy`, whose NaN is written as text."""

    after: float | None = None
    metric: str = ""


class _Pass(BaseModel):
    """What must hold of :class:`~optc.passmanager.contract.PassRecord`."""

    name: str
    options: dict[str, Any]
    notes: dict[str, Any] = {}


class _Report(BaseModel):
    """What must hold of :class:`~optc.report.report.Report`, of which artifacts written by hand may lack all."""

    precision: str = ""
    model_bytes: Annotated[int, Field(strict=True, ge=0)] | None = None
    accuracy: _Accuracy | None = None
    passes: list[_Pass] = []
    lowering: dict[str, Any] = {}
    costs: list[dict[str, Any]] = []


def _checked_as(kind: type[BaseModel]) -> AfterValidator:
    """Refuse what is no ``kind``; what is stays as it is, with everything that ``kind`` does not know."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        kind.model_validate(value)
        return value

    return AfterValidator(check)


class Manifest(BaseModel):
    """The contents of ``manifest.json``.

    Attributes:
        format_version: version of this schema; newer ones are refused.
        backend: what loads ``files``, given the first ones in ``load``.
        load: names of the runtime's files, the one to load first.
        target: device, threads and batch it was made for.
        machine: what it was made on; ``required_isa`` are the instruction sets it must find again, of those that are
            separated by ``|`` any.
        report: passes with options and evidence, accuracy, raw measurements.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["optc"] = "optc"
    format_version: int = SCHEMA_VERSION
    optc_version: str
    created: str
    backend: str
    load: tuple[str, ...]
    files: dict[str, FileEntry]
    inputs: tuple[TensorEntry, ...] = Field(min_length=1)
    model: Annotated[dict[str, Any], _checked_as(_Model)]
    target: Annotated[dict[str, Any], _checked_as(_Target)]
    machine: dict[str, Any]
    required_isa: tuple[str, ...] = ()
    report: Annotated[dict[str, Any], _checked_as(_Report)]

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
                raise ValueError(f"file name {name!r} leads out of the folder")
        return files

    @field_validator("load")
    @classmethod
    def _loads_something(cls, load: tuple[str, ...]) -> tuple[str, ...]:
        if not load:
            raise ValueError("no file to load")
        return load


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        ArtifactError: there is none, it is not valid, or it was written by a newer optc.
    """
    path = folder / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(
            f"'{folder}' is no optc artifact: it has no {NAME}", "give a folder that 'optc optimize' wrote"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error
    version = _version(text)
    if version is not None and version > SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has format version {version}, this optc reads up to {SCHEMA_VERSION}", "upgrade optc"
        )
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"{path} is not valid: {where}: {first['msg']}", "make the artifact again") from None
    missing = [name for name in manifest.load if name not in manifest.files]
    if missing:
        raise ArtifactError(
            f"{path} is not valid: {missing[0]} is to be loaded but has no hash", "make the artifact again"
        )
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Make sure every file is there, whole and unchanged.

    Raises:
        ArtifactError: names the first file that is missing, truncated or altered, or is a link.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise ArtifactError(f"{path} is missing", "copy the whole folder, or make the artifact again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(f"{path} has {size} bytes, its manifest says {entry.bytes}", "copy it again")
        if sha256(path) != entry.sha256:
            raise ArtifactError(f"{path} was altered: its SHA-256 is not the manifest's", "make the artifact again")


def file_entry(path: Path) -> FileEntry:
    """Size and hash of a file."""
    return FileEntry(bytes=path.stat().st_size, sha256=sha256(path))


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(text: str) -> int | None:
    """The format version of a manifest that may otherwise not be readable by this schema."""
    import json

    try:
        version = json.loads(text).get("format_version")
    except (ValueError, AttributeError, RecursionError):
        return None
    return version if isinstance(version, int) else None
