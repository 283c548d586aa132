"""The machine's peaks, measured once per machine, thread count and PyTorch, and kept beside the choices of backends."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from optc.bench.choice_cache import folder
from optc.bench.peaks import Peaks, measure_peaks
from optc.machine import cpu_name, isa, versions

log = logging.getLogger(__name__)


def peaks_file(threads: int) -> Path:
    """Where the peaks with so many threads are kept: ``$XDG_CACHE_HOME/optc/peaks``, by default under ``~/.cache``."""
    parts = [cpu_name(), isa(), threads, versions(("torch", "numpy"))]
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return folder().parent / "peaks" / f"{name}.json"


def peaks(threads: int) -> Peaks:
    """The machine's peaks with so many threads, measured if they are not known yet.

    If other work disturbed the last measurement, they are measured again, and the higher ones count.
    """
    file = peaks_file(threads)
    known = _read(file)
    if known is not None and not known.disturbed:
        return known
    found = measure_peaks(threads, datetime.now(UTC).isoformat(timespec="seconds"))
    if known is not None:
        found = found.or_better(known)
    _write(file, found)
    return found


def _read(file: Path) -> Peaks | None:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        bandwidth = tuple((int(size), float(rate)) for size, rate in known["bandwidth"])
        operations = {str(kind): float(rate) for kind, rate in known["operations"].items()}
        return Peaks(int(known["threads"]), operations, bandwidth, str(known["measured"]), str(known["disturbed"]))
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        log.debug("no peaks in %s: %s", file, error)
        return None


def _write(file: Path, found: Peaks) -> None:
    """Whole or not at all; where the cache cannot be written, the peaks are measured again next time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as stream:
            json.dump(asdict(found), stream, indent=1)
    except OSError as error:
        log.debug("cannot keep the peaks: %s", error)
        return
    try:
        Path(stream.name).replace(file)
    except OSError as error:
        log.debug("cannot keep the peaks: %s", error)
        with suppress(OSError):
            Path(stream.name).unlink()
