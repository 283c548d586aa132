"""What a runtime does otherwise than it was asked, as rows for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

NAMED = 8
"""How many nodes a row names."""


def deviations(lowering: Mapping[str, Any], every: bool = False) -> list[tuple[str, str, str]]:
    """Nodes that fell back to another provider, layers in another type than asked, casts that the runtime added.

    Args:
        lowering: a backend's ``Lowered.details``. Read are ``"fallback"``, ``"not_int8"`` and its like, and
            ``"inserted_casts"``; of a pipeline those of its ``"stages"``.
        every: name every node instead of the first few.

    Returns:
        What, the nodes, and why; one row for all nodes with the same reason.
    """
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for place, part in (("", lowering), *((f"stage {each['stage']}: ", each) for each in lowering.get("stages", ()))):
        for each in part.get("fallback", ()):
            groups[f"on {each['provider']}", "the provider asked for did not take them"].append(
                f"{place}{each['node']} ({each['operator']})"
            )
        for key, found in part.items():
            if key.startswith("not_") and isinstance(found, Mapping):
                for layer, reason in found.items():
                    groups[key.replace("_", " "), reason].append(f"{place}{layer}")
        for cast, count in part.get("inserted_casts", {}).items():
            groups["casts added", "the runtime lacks kernels in the graph's type"].append(f"{place}{count} {cast}")
    return [(what, _named(names, every), reason) for (what, reason), names in groups.items()]


def _named(names: Sequence[str], every: bool) -> str:
    if every or len(names) <= NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:NAMED])} and {len(names) - NAMED} more (see manifest.json, or run with -v)"
