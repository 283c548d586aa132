"""A reference model that every profile is compared with: measured once for a machine, its versions and its limits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optc.bench import statistics
from optc.bench.cache import cache_file, cache_folder, write_cache
from optc.bench.compare import contender
from optc.bench.results import CandidateResult
from optc.bench.run import Run, parse_run, read_run
from optc.bench.statistics import Ratio
from optc.errors import MeasurementError
from optc.frontend.load import find_source
from optc.lowering.manifest import sha256
from optc.paths import user_path
from optc.progress import Progress

DEFAULT = "vit_huge_patch14_224"
NONE = "none"
_OWN_WEIGHTS = ("factory", "pt2")
"""Sources of models that bring their weights with them."""
MEMORY_BYTES = {DEFAULT: 8 * 10**9}
"""What measuring takes at its peak; with less free memory it is not tried."""


@dataclass(frozen=True)
class Reference:
    """The reference as it was measured.

    Attributes:
        result: the fastest of its baselines.
        run: all of them, with raw latencies.
        weights: where its weights come from: ``"random"``, unless it brings its own.
        parameters: how many it has; ``None`` if unknown.
        file: where it is remembered; ``None`` of a factory's model, which is measured each time.
    """

    name: str
    result: CandidateResult
    run: Run
    weights: str
    parameters: int | None
    file: Path | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before believing its latencies."""
        return (*self.run.warnings, *self.result.warnings)

    def ratio(self, result: CandidateResult) -> Ratio:
        """Median latency of ``result`` over the reference's. They were not measured in turns."""
        return statistics.ratio_of_medians(result.latencies_ns, self.result.latencies_ns, interleaved=False)


def reference(name: str, surroundings: Mapping[str, Any], options: tuple[str, ...], progress: Progress) -> Reference:
    """The reference model, from the cache or measured now in a process of its own.

    Args:
        surroundings: where the profile is made; another machine, version or limit is another reference.
        options: command-line options that limit the threads and the like, for the process that measures.

    Raises:
        UnknownNameError: there is no such model.
        MeasurementError: it cannot be measured; says why.
    """
    from optc.machine import available_memory

    source, given = find_source(name)
    try:
        contents = sha256(user_path(given)) if source.name == "pt2" else ""
    except OSError as error:
        raise MeasurementError(f"cannot read '{given}': {error.strerror}", f"--against another, or {NONE}") from error
    known = {"model": name, "contents": contents, "surroundings": dict(surroundings)}
    # What a factory's code does by now its name does not say.
    file = cache_file(cache_folder("references"), known) if source.name != "factory" else None
    run = _recalled(file) if file else None
    if run is None:
        need, free = MEMORY_BYTES.get(name, 0), available_memory()
        if need > free:
            raise MeasurementError(
                f"measuring {name} takes {need / 1e9:.0f} GB of memory, {free / 1e9:.1f} GB are free",
                f"--against a smaller model, or {NONE}",
            )
        once = ", once for this machine" if file else ""
        with progress.step(f"Measuring {name} to compare with{once} (minutes for a large model)"):
            text = _measure(name, () if source.name in _OWN_WEIGHTS else ("--weights", "random"), options)
        run = parse_run(text, name)
        contender(name, run.results)  # raises where nothing was measured, which is not to be remembered
        if file:
            write_cache(file, text)
    target = next(iter(run.targets), {})
    best = contender(name, run.results).result
    return Reference(name, best, run, str(target.get("weights", "")), target.get("parameters"), file)


def _recalled(file: Path) -> Run | None:
    """The run in a file; ``None`` if there is none, or none that holds a result (it is then measured again)."""
    try:
        run = read_run(file)
        contender(run.name, run.results)
        return run
    except MeasurementError:
        return None


def _measure(name: str, weights: tuple[str, ...], options: tuple[str, ...]) -> str:
    command = [sys.executable, "-P", "-m", "optc.cli.main", "profile", name, *weights, "--against", NONE]
    done = subprocess.run([*command, *options, "--json", "-q"], capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines()
    if done.returncode != 0:
        why = lines[-1].removeprefix("optc: ") if lines else f"its process ended with {done.returncode}"
        raise MeasurementError(f"{name} could not be measured to compare with: {why}", f"--against {NONE}")
    return done.stdout
