"""``optc doctor``: what is installed, what works, what this machine can do, and the pip line for what is missing."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import asdict
from typing import Any

import click
from rich.table import Column, Table
from rich.text import Text

import optc
from optc.cli.backends import status
from optc.cli.options import json_option, print_json, silence_unless
from optc.cli.terminal import stdout
from optc.plugins.registry import KINDS, RAISED, where_from, working

EXTRAS = {
    "onnxruntime": ("the onnxruntime backend", "optc[cpu]"),
    "mlperf_loadgen": ("measuring", "mlcommons-loadgen"),
    "torchao": ("the quant pass", "torchao"),
    "timm": ("timm's models", "timm"),
    "torchvision": ("torchvision's models", "torchvision"),
    "openvino": ("the backend openvino, with the plugin optc-openvino", "optc-openvino"),
    "torch_tensorrt": ("GPU inference through TensorRT", "optc[gpu]"),
}
"""Import name: what it is for, and what to install where it is missing."""


@click.command("doctor")
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Show other packages' messages too.")
def command(as_json: bool, verbose: bool) -> None:
    """Show what is installed, what works and what this machine can do."""
    silence_unless(verbose)
    diagnosis = diagnose()
    print_json(diagnosis) if as_json else _print(diagnosis)


def diagnose() -> dict[str, Any]:
    """Everything ``optc doctor`` tells, JSON-ready. Imports torch and the backends to see whether they work."""
    from optc.machine import machine

    plugins, broken = working()
    return {
        "optc": optc.__version__,
        "python": sys.version.split()[0],
        "machine": asdict(machine(gpus=True)),
        "packages": [_package(name, *about) for name, about in EXTRAS.items()],
        "backends": [status(plugins, name) for name in plugins.all("backend")],
        "plugins": sorted({each.plugin for kind in KINDS for each in plugins.all(kind).values()}),
        "broken": [{"name": name, "reason": error.message, "mend": error.hint} for name, error in broken.items()],
        "advice": _advice(machine(gpus=True).isa),
    }


def _package(name: str, purpose: str, install: str) -> dict[str, Any]:
    """Whether a package is there and can be imported; if not, why and the pip line."""
    found = where_from(install)
    line = f"pip install {found}" if found != install else f"pip install '{install}'"
    row: dict[str, Any] = {"name": name, "for": purpose, "ready": False, "install": line}
    if importlib.util.find_spec(name) is None:
        return {**row, "reason": "not installed"}
    try:
        if name in ("torchvision", "timm"):
            from optc.torchvision_ops import declare_torchvision_ops

            declare_torchvision_ops()
        importlib.import_module(name)
    except RAISED as error:
        return {**row, "reason": f"installed, but importing it fails: {type(error).__name__}: {error}".splitlines()[0]}
    return {**row, "ready": True, "reason": None}


def _advice(isa: tuple[str, ...] | None) -> list[str]:
    """What this machine's instruction set means for the user."""
    from optc.machine import emulates_bf16, saturates_int8

    advice = []
    if saturates_int8(isa):
        advice.append("this CPU has no int8 dot-product instructions (VNNI, AMX): int8 may well be slower than float32")
    if emulates_bf16(isa):
        advice.append("this CPU has no bfloat16 instructions: bfloat16 is emulated and slow")
    if shutil.which("c++") is None and shutil.which("g++") is None and shutil.which("clang++") is None:
        advice.append(
            "no C++ compiler: the torch.compile baseline cannot be measured; install g++ (apt-get install g++)"
        )
    return advice


def _print(diagnosis: dict[str, Any]) -> None:
    console = stdout()
    facts = diagnosis["machine"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("optc", f"{diagnosis['optc']} on Python {diagnosis['python']}")
    for key, value in facts.items():
        if key == "packages":
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        elif key.endswith("bytes"):
            key, value = key.removesuffix("_bytes"), f"{value / 2**30:.1f} GiB"
        elif isinstance(value, (tuple, list)):
            value = ", ".join(value) or "none"
        table.add_row(key.replace("_", " "), str(value))
    table.add_row("plugins", ", ".join(diagnosis["plugins"]))
    console.print(table)
    console.print()
    what, state, mend = (Column(name, overflow="fold") for name in ("what", "state", "to mend it"))  # to be copied
    rows = Table(what, state, "for", mend, box=None, pad_edge=False, header_style="bold")
    for row in diagnosis["packages"]:
        rows.add_row(row["name"], _state(row), row["for"], "" if row["ready"] else row["install"])
    for row in diagnosis["backends"]:
        rows.add_row(f"backend {row['name']}", _state(row), row["summary"])
    for row in diagnosis["broken"]:
        rows.add_row(f"plugin {row['name']}", Text(row["reason"], "yellow"), "", row["mend"])
    console.print(rows)
    for line in diagnosis["advice"]:
        console.print(f"! {line}", style="yellow")


def _state(row: dict[str, Any]) -> Text:
    return Text("works", "green") if row["ready"] else Text(str(row["reason"]), "yellow")
