"""Choices among backends that were measured before on this machine with these versions, one small JSON file each."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from optc.bench.choice import Outcome
from optc.lowering.backend import Backend
from optc.machine import machine
from optc.plugins.registry import ENTRY_POINT_GROUP
from optc.program import Program
from optc.target import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The outcome of every backend, the kept one first, and when it was measured (ISO 8601, UTC)."""

    outcomes: tuple[Outcome, ...]
    measured: str


def folder() -> Path:
    """Where choices are kept: ``$XDG_CACHE_HOME/optc/choices``, by default under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optc" / "choices"


def file_of(program: Program, target: Target, backends: Sequence[Backend]) -> Path:
    """The file of a choice: named by a hash of the program with its weights, the target, the machine and the versions
    of everything the choice may depend on, plugins included.
    """
    here = machine()
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    parts = {
        "program": program.fingerprint(contents=True),
        "inputs": [[str(t.dtype), *t.shape[1:]] for t in program.example_inputs],
        "target": asdict(target),
        "backends": sorted(backend.name for backend in backends),
        "machine": [here.cpu, here.isa, here.cores, here.memory_bytes, here.gpus, here.system, here.python],
        "packages": here.packages,
        "plugins": sorted(f"{point.dist.name} {point.dist.version}" for point in points if point.dist),
    }
    return folder() / f"{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}.json"


def recall(file: Path) -> Choice | None:
    """The choice in a file; ``None`` if there is none or it cannot be read (it is then measured again)."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        outcomes = tuple(Outcome(**outcome) for outcome in found["outcomes"])
        return Choice(outcomes, str(found["measured"])) if outcomes and outcomes[0].chosen else None
    except (OSError, ValueError, TypeError, LookupError) as error:
        log.debug("no choice in %s: %s", file, error)
        return None


def remember(file: Path, outcomes: Sequence[Outcome]) -> None:
    """Write a choice, whole or not at all; where the cache cannot be written, it is measured again next time."""
    text = json.dumps({"outcomes": [asdict(each) for each in outcomes], "measured": _now()}, indent=1)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".choice-", dir=file.parent)
    except OSError as error:
        log.debug("cannot keep the choice: %s", error)
        return
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).replace(file)
    except OSError as error:
        log.debug("cannot keep the choice: %s", error)
        with suppress(OSError):
            Path(temporary).unlink()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
