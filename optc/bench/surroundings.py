"""What a latency depends on besides the model: machine, versions, limits. Latencies compare only where these agree."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution
from typing import Any

from optc import machine
from optc.plugins.registry import ENTRY_POINT_GROUP
from optc.target import Target

_NAMES = {"cpus": "CPUs", "cpu": "CPU", "gpus": "GPUs", "isa": "instruction sets", "memory_bytes": "memory"}


def surroundings(target: Target, limits: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The machine, the versions of everything a latency may depend on, plugins included, the target and the limits.

    JSON-ready. The load at the moment is no part of it.
    """
    here = machine.machine()
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    plugins = {point.dist.name: point.dist for point in points if point.dist}
    return {
        "cpu": here.cpu,
        "isa": list(here.isa) if here.isa is not None else None,
        "cores": here.cores,
        "memory_bytes": here.memory_bytes,
        "gpus": list(here.gpus),
        "system": here.system,
        "python": here.python,
        "packages": here.packages | machine.versions(_required(plugins.values())),
        "plugins": sorted(f"{name} {dist.version}" for name, dist in plugins.items()),
        "device": target.device,
        "threads": target.threads,
        "batch": target.batch,
        **(limits or {}),
    }


def _required(plugins: Iterable[Distribution]) -> list[str]:
    """The packages that plugins need, such as their runtimes; what this project needs is known by name."""
    own = importlib.metadata.distribution("optc").name
    needed = (text for dist in plugins if dist.name != own for text in dist.requires or () if "extra ==" not in text)
    return sorted({match[0] for text in needed if (match := re.match(r"[\w.-]+", text))})


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What differs between two surroundings, in words such as ``"threads 2 and 1"``; empty if they compare."""
    found = []
    for key in dict.fromkeys((*first, *second)):
        one, other = first.get(key), second.get(key)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            names = [name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name)]
            found += [f"{name} {one.get(name, 'missing')} and {other.get(name, 'missing')}" for name in names]
        else:
            found.append(f"{_NAMES.get(key, key.replace('_', ' '))} {_text(one)} and {_text(other)}")
    return found


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)
