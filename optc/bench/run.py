"""Measured runs as JSON files: what ``optc profile`` writes, to be compared with later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optc
from optc.bench.results import Block, CandidateResult, Measurement
from optc.bench.statistics import Percentiles
from optc.bench.summary import LoadGenSummary
from optc.errors import MeasurementError

FORMAT, FORMAT_VERSION = "optc profile", 1
RUN_FILE = "profile.json"
"""What a run is called in the folder that ``optc profile -o`` writes."""
_HINT = "give the folder that 'optc profile -o' wrote, or what 'optc profile --json' printed, as a .json file"


@dataclass(frozen=True)
class Run:
    """A run read back.

    Attributes:
        name: the file it was read from, or what else it is to be called.
        results: raw latencies included.
        surroundings: as :func:`optc.bench.surroundings.surroundings` said then.
        created: when, ISO 8601, UTC.
        targets: what is known of each target, by ``"name"``: parameters, accuracy, where its weights come from.
        warnings: what to know before believing its numbers.
    """

    name: str
    results: tuple[CandidateResult, ...]
    surroundings: Mapping[str, Any]
    created: str
    targets: tuple[Mapping[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


def run_document(measurement: Measurement, surroundings: Mapping[str, Any]) -> dict[str, Any]:
    """A measurement and where it was made, JSON-ready."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "optc": optc.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "surroundings": dict(surroundings),
        **measurement.to_dict(),
    }


def read_run(path: Path) -> Run:
    """Read a run back from a file.

    Raises:
        MeasurementError: it cannot be read, is no run, or was written by a newer optc.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MeasurementError(f"cannot read '{path}': {error}", _HINT) from error
    return parse_run(text, str(path))


def parse_run(text: str, name: str) -> Run:
    """Read a run back from its text; raises as :func:`read_run` does, calling it ``name``."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise MeasurementError(f"cannot read '{name}': {error}", _HINT) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise MeasurementError(f"'{name}' is no measured run", _HINT)
    version = document.get("format_version")
    if not isinstance(version, int):
        raise MeasurementError(f"'{name}' is not valid: its format_version is {version!r}", _HINT)
    if version > FORMAT_VERSION:
        raise MeasurementError(f"'{name}' was written by a newer optc ({document.get('optc')})", "upgrade optc")
    try:
        results = tuple(_result(entry) for entry in document["results"])
        known = tuple(document.get("targets", ()))
        warnings = [str(warning) for warning in document.get("warnings", ())]
        if reason := document.get("sequential_reason"):
            warnings.append(f"measured one after another, not in turns: {reason}")
        return Run(name, results, dict(document["surroundings"]), str(document["created"]), known, tuple(warnings))
    except (LookupError, TypeError, ValueError) as error:
        raise MeasurementError(f"'{name}' is not valid: {type(error).__name__}: {error}", _HINT) from error


def _result(entry: Mapping[str, Any]) -> CandidateResult:
    blocks = tuple(
        Block(tuple(block["latencies_ns"]), block["nonfinite_queries"], _summary(block["loadgen"]))
        for block in entry["blocks"]
    )
    percentiles = Percentiles(**entry["percentiles"]) if entry["percentiles"] else None
    changed = {"blocks": blocks, "percentiles": percentiles, "warnings": tuple(entry["warnings"])}
    return CandidateResult(**{**entry, **changed})


def _summary(entry: Mapping[str, Any]) -> LoadGenSummary:
    return LoadGenSummary(**{**entry, "reasons": tuple(entry["reasons"])})
