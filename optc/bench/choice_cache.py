"""Choices among backends that were measured before on this machine with these versions, one small JSON file each."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from optc.bench.cache import cache_file, cache_folder, write_cache
from optc.bench.choice import Outcome
from optc.bench.surroundings import surroundings
from optc.lowering.backend import Backend
from optc.plugins.registry import registry
from optc.program import Program
from optc.target import Target

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The outcome of every backend, the kept one first, when it was measured (ISO 8601, UTC), and by what disturbed."""

    outcomes: tuple[Outcome, ...]
    measured: str
    disturbed: str = ""


def folder() -> Path:
    """Where choices are kept: ``$XDG_CACHE_HOME/optc/choices``, by default under ``~/.cache``."""
    return cache_folder("choices")


def file_of(
    programs: Mapping[str, Program],
    target: Target,
    backends: Sequence[Backend],
    varying: Mapping[str, Any] | None = None,
) -> Path:
    """The file of a choice: named by a hash of the programs with their weights, by the lists of passes that made them,
    the target, the machine and the versions of everything the choice may depend on, plugins included.

    Args:
        varying: what stands for programs that come out otherwise each time though from the same model: by the list of
            passes what they were made with, JSON-ready. Not for all of them, as the others tell the model.
    """
    first, varying = next(iter(programs.values())), varying or {}
    parts = {
        "programs": {
            passes: varying[passes] if passes in varying else program.fingerprint(contents=True)
            for passes, program in programs.items()
        },
        "inputs": [[str(t.dtype), *t.shape[first.dynamic_batch :]] for t in first.example_inputs],
        "target": asdict(target),
        "backends": sorted(backend.name for backend in backends),
        "surroundings": surroundings(target),
        "code": _code(),
    }
    return cache_file(folder(), parts)


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of the Python files of what provides passes and backends: between releases versions stay the same."""
    entries = (each.entry for kind in ("pass", "backend") for each in registry().all(kind).values())
    found = hashlib.sha256()
    for name in sorted({entry.target.partition(":")[0].partition(".")[0] for entry in entries}):
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
        files = [file for folder in folders for file in folder.rglob("*.py")]
        files += [Path(spec.origin)] if spec and spec.origin and not folders else []
        for file in sorted(filter(Path.is_file, files)):
            found.update(file.read_bytes())
    return found.hexdigest()


def recall(file: Path) -> Choice | None:
    """The choice in a file; ``None`` if there is none or it cannot be read (it is then measured again)."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        outcomes = tuple(Outcome(**outcome) for outcome in found["outcomes"])
        choice = Choice(outcomes, str(found["measured"]), str(found["disturbed"]))
        return choice if outcomes and outcomes[0].chosen else None
    except (OSError, ValueError, TypeError, LookupError) as error:
        log.debug("no choice in %s: %s", file, error)
        return None


def remember(file: Path, outcomes: Sequence[Outcome], disturbed: str = "") -> None:
    """Write a choice, whole or not at all; where the cache cannot be written, it is measured again next time."""
    document = {"outcomes": [asdict(each) for each in outcomes], "measured": _now(), "disturbed": disturbed}
    write_cache(file, json.dumps(document, indent=1, default=str))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
