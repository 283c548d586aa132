"""What was measured before and need not be again: JSON files in the user's cache, named by what they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from optc.paths import user_path

log = logging.getLogger(__name__)


def cache_folder(kind: str) -> Path:
    """``$XDG_CACHE_HOME/optc/KIND``, by default under ``~/.cache``; without a home one that cannot be written."""
    base = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (Path("/nonexistent") if str(base).startswith("~") else base) / "optc" / kind


def cache_file(folder: Path, parts: Mapping[str, Any]) -> Path:
    """The file in ``folder`` for what depends on ``parts``, which are JSON-ready: named by their hash."""
    text = json.dumps(parts, sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def write_cache(file: Path, text: str) -> None:
    """Write a file, whole or not at all; where the cache cannot be written, it is measured again next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".cache-", dir=file.parent)
    except OSError as error:
        log.debug("cannot write to the cache: %s", error)
        return
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).replace(file)
    except OSError as error:
        log.debug("cannot write to the cache: %s", error)
        with suppress(OSError):
            Path(temporary).unlink()
