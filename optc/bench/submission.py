"""LoadGen's logs in the folders that MLPerf's submission checker expects, in the open division."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import optc
from optc import machine
from optc.bench.settings import Scenario
from optc.target import Target

DIVISION, SUBMITTER = "open", "optc"
BENCHMARK = "resnet"
"""MLPerf's own name for image classification; ``model_mapping.json`` says that each of ours is one."""
_UNKNOWN = "not recorded"


class Submission:
    """A folder tree under ``root``; see ``tools/submission/submission_structure.md`` in mlcommons/inference."""

    def __init__(self, root: Path, target: Target) -> None:
        self.root = root
        self._target = target
        self._submitter = root / DIVISION / SUBMITTER
        self._slugs: dict[str, str] = {}
        self._system = slug(f"{machine.cpu_name()}-{target.threads}-threads")

    def performance(self, name: str, scenario: Scenario, run: int = 1) -> Path:
        """Where the logs of a performance run go."""
        return self._scenario(name, scenario) / "performance" / f"run_{run}"

    def accuracy(self, name: str, scenario: Scenario) -> Path:
        """Where the logs of an accuracy run go."""
        return self._scenario(name, scenario) / "accuracy"

    def describe(
        self,
        names: Mapping[str, str],
        scenarios: Mapping[Scenario, Path | None],
        weights: Mapping[str, str],
        commands: Sequence[str],
    ) -> None:
        """Write what goes beside the logs: the system, each benchmark's settings, and how it was made.

        Args:
            names: precision by candidate.
            scenarios: those that were run, each with the file of settings that it was run with.
            weights: where the weights come from, by candidate.
            commands: what was typed.
        """
        how = "\n".join(["Made by optc with:", "", *(f"    {command}" for command in commands), ""])
        for name, precision in names.items():
            for scenario, conf in scenarios.items():
                folder = self._scenario(name, scenario)
                if not folder.exists():
                    continue  # it did not open: there are no logs
                _write(folder / "user.conf", conf.read_text(encoding="utf-8") if conf else "# MLPerf's defaults\n")
                _write(folder / "README.md", f"# {name}, {scenario}\n\n{how}")
                _write(folder / "measurements.json", json.dumps(_measurements(precision, weights[name]), indent=1))
        _write(self._submitter / "systems" / f"{self._system}.json", json.dumps(self._description(), indent=1))
        _write(self._submitter / "src" / "README.md", f"# Source\n\noptc {optc.__version__}.\n\n{how}")
        mapping = {self._slug(name): BENCHMARK for name in names}
        _write(self._submitter / "model_mapping.json", json.dumps(mapping, indent=1))

    def _scenario(self, name: str, scenario: Scenario) -> Path:
        return self._submitter / "results" / self._system / self._slug(name) / scenario

    def _slug(self, name: str) -> str:
        """A folder's name for a candidate, with a number where another has the same."""
        if name not in self._slugs:
            base, taken = slug(name), set(self._slugs.values())
            numbered = (f"{base}-{number}" if number > 1 else base for number in count(1))
            self._slugs[name] = next(each for each in numbered if each not in taken)
        return self._slugs[name]

    def _description(self) -> dict[str, Any]:
        here = machine.machine()
        known = {
            "division": DIVISION,
            "submitter": SUBMITTER,
            "status": "rdi",
            "system_type": "edge",
            "system_name": self._system,
            "number_of_nodes": "1",
            "host_processor_model_name": here.cpu,
            "host_processors_per_node": "1",
            "host_processor_core_count": str(here.cores),
            "host_memory_capacity": f"{here.memory_bytes / 2**30:.0f} GiB",
            "accelerators_per_node": str(len(here.gpus)),
            "accelerator_model_name": ", ".join(here.gpus) or "none",
            "framework": ", ".join(f"{name} {version}" for name, version in here.packages.items()),
            "operating_system": here.system,
            "other_software_stack": f"Python {here.python}",
            "hw_notes": f"{self._target.threads} threads; {', '.join(here.isa or ())}",
            "sw_notes": "",
        }
        return {**dict.fromkeys(_FIELDS, _UNKNOWN), **known}


_FIELDS = (
    *("host_storage_capacity", "host_storage_type", "accelerator_memory_capacity", "host_processor_frequency"),
    *("host_processor_caches", "host_memory_configuration", "host_processor_interconnect", "host_networking"),
    *("host_networking_topology", "accelerator_frequency", "accelerator_host_interconnect"),
    *("accelerator_interconnect", "accelerator_interconnect_topology", "accelerator_memory_configuration"),
    *("accelerator_on-chip_memories", "cooling", "host_network_card_count", "system_type_detail"),
)


def slug(name: str) -> str:
    """A name as one part of a path."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def _measurements(precision: str, weights: str) -> dict[str, str]:
    return {
        "input_data_types": "fp32",
        "retraining": "no",
        "starting_weights_filename": weights or _UNKNOWN,
        "weight_data_types": precision or _UNKNOWN,
        "weight_transformations": "see README.md",
    }


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
