"""``manifest.json``: what an artifact is, how it was made, what was proven and measured, and the hash of every file."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from optc.errors import ArtifactError

SCHEMA_VERSION = 1
NAME = "manifest.json"


class FileEntry(BaseModel):
    """A file of the artifact: its size in bytes and SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TensorEntry(BaseModel):
    """An input: its name, shape (``None`` where it may vary) and dtype as numpy spells it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: tuple[int | None, ...]
    dtype: str


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
    inputs: tuple[TensorEntry, ...]
    model: dict[str, Any]
    target: dict[str, Any]
    machine: dict[str, Any]
    required_isa: tuple[str, ...] = ()
    report: dict[str, Any]

    @field_validator("files")
    @classmethod
    def _names_stay_inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
                raise ValueError(f"file name {name!r} leads out of the folder")
        return files

    @field_validator("target")
    @classmethod
    def _target_has_its_types(cls, target: dict[str, Any]) -> dict[str, Any]:
        counts, options = [target.get("threads", 1), target.get("batch", 1)], target.get("options", {})
        if not isinstance(target.get("device", ""), str):
            raise ValueError("its device is no name")
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError("its threads or batch are no positive number")
        if not (isinstance(options, dict) and all(isinstance(each, dict) for each in options.values())):
            raise ValueError("its options are none by name of a backend")
        return target

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
