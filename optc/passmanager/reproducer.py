"""A folder that reproduces a failed verification without the run that found it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from optc.passmanager.contract import Pass, PassContext
from optc.program import Program

CALIBRATION_SAMPLES = 128
"""How many samples of calibration data a reproducer holds, or some more: all of them may be gigabytes."""

_SCRIPT = '''\
"""Reproduces: {reason}

Runs pass {name!r} on the program as it was just before it, and compares the outputs. The pass is given the target and
calibration data of the run that failed, no accuracy budget, and nothing to measure latency on.
"""

import json
from pathlib import Path

from safetensors.torch import load_file

import optc.ops  # registers composite operators
from optc.batches import as_calibration
from optc.frontend.capture import program_from_exported
from optc.frontend.pt2_source import load_exported
from optc.passmanager.compare import compare
from optc.passmanager.contract import PassContext
from optc.plugins.registry import registry
from optc.program import ModelInfo
from optc.target import Target

here = Path(__file__).parent


def tensors(file):
    saved = load_file(here / file)
    return tuple(saved[name] for name in sorted(saved, key=lambda name: int(name.partition("_")[0])))


inputs = tensors("inputs.safetensors")
program = program_from_exported(load_exported(here / "before.pt2"), inputs, False, ModelInfo())
given = json.loads((here / "given.json").read_text())
pass_ = registry().load("pass", {name!r})(**given["options"])
batches = [tensors(file) for file in given["calibration"]]
calibration = as_calibration(batches or None, program)
context = PassContext(Target(**given["target"]), calibration, isa=given["isa"] and tuple(given["isa"]))
after = pass_(program, context).program
print(compare([program.run(*inputs)], [after.run(*inputs)]))
'''


def write_reproducer(
    parent: Path,
    pass_: Pass,
    before: Program,
    after: Program,
    inputs: tuple[Tensor, ...],
    reason: str,
    context: PassContext,
) -> Path:
    """Write the program before the pass, inputs, calibration batches, both graphs as text and ``reproduce.py``.

    Returns the folder: ``optc-reproducer-PASS`` in ``parent``, numbered if that exists.
    """
    from safetensors.torch import save_file

    path, number = parent / f"optc-reproducer-{pass_.name}", 1
    while path.exists():
        number += 1
        path = parent / f"optc-reproducer-{pass_.name}-{number}"
    path.mkdir(parents=True)
    names = [node.name for node in before.graph.find_nodes(op="placeholder")]

    def save(tensors: tuple[Tensor, ...], file: str) -> str:
        saved = {f"{i}_{name}": t.clone().contiguous() for i, (name, t) in enumerate(zip(names, tensors, strict=True))}
        save_file(saved, path / file)  # which takes no tensors that share memory
        return file

    save(inputs, "inputs.safetensors")
    given = {
        "options": pass_.options.model_dump(mode="json"),
        "target": asdict(context.target),
        "isa": context.isa,
        "calibration": [
            save(batch, f"calibration-{number}.safetensors")
            for number, batch in enumerate(_first(context.calibration or (), CALIBRATION_SAMPLES))
        ],
    }
    with torch.no_grad():
        torch.export.save(torch.export.export(before.module, inputs), path / "before.pt2")
    (path / "before.txt").write_text(before.text())
    (path / "after.txt").write_text(after.text())
    (path / "given.json").write_text(json.dumps(given, indent=2))
    (path / "reproduce.py").write_text(_SCRIPT.format(reason=reason, name=pass_.name))
    return path


def _first(batches: Iterable[tuple[Tensor, ...]], samples: int) -> Iterator[tuple[Tensor, ...]]:
    """The batches that have so many samples together."""
    for batch in batches:
        yield batch
        samples -= len(batch[0])
        if samples <= 0:
            return
