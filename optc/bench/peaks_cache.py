"""The machine's peaks, measured once per machine, thread count and PyTorch, and kept beside the choices of backends."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from optc.bench.cache import cache_file, cache_folder, write_cache
from optc.bench.peaks import Peaks, measure_peaks
from optc.machine import cpu_name, isa, versions

log = logging.getLogger(__name__)


def peaks_file(threads: int) -> Path:
    """Where the peaks with so many threads are kept: ``$XDG_CACHE_HOME/optc/peaks``, by default under ``~/.cache``."""
    parts = {"cpu": cpu_name(), "isa": isa(), "threads": threads, "versions": versions(("torch", "numpy"))}
    return cache_file(cache_folder("peaks"), parts)


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
    write_cache(file, json.dumps(asdict(found), indent=1))
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
