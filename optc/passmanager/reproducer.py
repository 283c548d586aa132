"""A folder that reproduces a failed verification without the run that found it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from optc.passmanager.contract import Pass
from optc.program import Program

_SCRIPT = '''\
"""Reproduces: {reason}

Runs pass {name!r} on the program as it was just before it, and compares the outputs.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import optc.ops  # registers composite operators
from optc.frontend.capture import program_from_exported
from optc.passmanager.compare import compare
from optc.plugins.registry import registry
from optc.program import ModelInfo

here = Path(__file__).parent
saved = load_file(here / "inputs.safetensors")
inputs = tuple(saved[name] for name in sorted(saved, key=lambda name: int(name.partition("_")[0])))
program = program_from_exported(torch.export.load(here / "before.pt2"), inputs, False, ModelInfo())
options = json.loads((here / "options.json").read_text())
pass_ = registry().load("pass", {name!r})(**options)
after = pass_(program).program
print(compare([program.run(*inputs)], [after.run(*inputs)]))
'''


def write_reproducer(
    parent: Path, pass_: Pass, before: Program, after: Program, inputs: tuple[Tensor, ...], reason: str
) -> Path:
    """Write ``before.pt2``, ``inputs.safetensors``, both graphs as text and ``reproduce.py`` into a new folder.

    Returns the folder: ``optc-reproducer-PASS`` in ``parent``, numbered if that exists.
    """
    from safetensors.torch import save_file

    path, number = parent / f"optc-reproducer-{pass_.name}", 1
    while path.exists():
        number += 1
        path = parent / f"optc-reproducer-{pass_.name}-{number}"
    path.mkdir(parents=True)
    names = [node.name for node in before.graph.find_nodes(op="placeholder")]
    save_file(
        {f"{i}_{name}": t.contiguous() for i, (name, t) in enumerate(zip(names, inputs, strict=True))},
        path / "inputs.safetensors",
    )
    with torch.no_grad():
        torch.export.save(torch.export.export(before.module, inputs), path / "before.pt2")
    (path / "before.txt").write_text(before.text())
    (path / "after.txt").write_text(after.text())
    (path / "options.json").write_text(json.dumps(pass_.options.model_dump(mode="json"), indent=2))
    (path / "reproduce.py").write_text(_SCRIPT.format(reason=reason, name=pass_.name))
    return path
