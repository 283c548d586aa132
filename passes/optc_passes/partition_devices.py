"""Devices to cut a model for: named ones as their data sheets say, this machine's CPU, others from a TOML file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optc import OptcError

MOST = 4096
"""Devices in a list, and stages."""
GB, TERA, MICRO = 1e9, 1e12, 1e-6
_NOMINAL_CPU_FLOPS = 60e9
"""Per thread in float32: 16 fused multiply-adds a cycle (two AVX2 units) at about 2 GHz. For where nobody measures."""
_NOMINAL_CPU_BANDWIDTH = 10 * GB
"""Per thread, of two DDR4 or DDR5 channels shared by a few."""


@dataclass(frozen=True)
class Device:
    """What a stage runs on.

    Attributes:
        name: such as ``"h100"`` or ``"cpu:1"``.
        flops: dense operations a second by type (``"float32"``, ``"bfloat16"``, …); a type that is not there computes
            like float32.
        bandwidth: of its memory, bytes a second.
        memory: bytes, ``None`` where there is no limit.
        link_bandwidth: bytes a second to a neighbour, one way.
        link_latency: seconds until the first byte of a message arrives.
        threads: of this machine's CPU; 0 for what is none.
        sharing: stages that share its memory, of which ``memory`` is one's part.
    """

    name: str
    flops: Mapping[str, float] = field(hash=False)
    bandwidth: float
    memory: int | None
    link_bandwidth: float
    link_latency: float
    threads: int = 0
    sharing: int = 1

    def peak(self, kind: str) -> float:
        """Operations a second in a type."""
        return self.flops.get(kind, self.flops["float32"])


def _gpu(name: str, memory: float, bandwidth: float, link: float, latency: float, **tera: float) -> Device:
    """A GPU from a data sheet's units: GB, GB/s, GB/s one way, µs, TFLOP/s."""
    flops = {kind: value * TERA for kind, value in tera.items()}
    return Device(name, flops, bandwidth * GB, round(memory * GB), link * GB, latency * MICRO)


# Dense peaks: the data sheets' with sparsity, halved. Links one way: half of what the sheets give for both. Latencies,
# which no sheet has, are assumed: for an NCCL send and receive about 10 µs over NVLink, 20 µs over PCIe.
_HOPPER = {"float32": 67, "tf32": 494.7, "bfloat16": 989.4, "float16": 989.4, "int8": 1978.9}
KNOWN = {
    each.name: each
    for each in (
        _gpu("h100", 80, 3350, 450, 10, **_HOPPER),  # NVIDIA H100 SXM5 data sheet; NVLink 4: 900 GB/s
        _gpu("h200", 141, 4800, 450, 10, **_HOPPER),  # NVIDIA H200 SXM data sheet
        _gpu("a100", 80, 2039, 300, 10, float32=19.5, tf32=156, bfloat16=312, float16=312, int8=624),  # SXM4, 80 GB
        _gpu("l4", 24, 300, 32, 20, float32=30.3, tf32=60, bfloat16=121, float16=121, int8=242.5),  # PCIe 4.0 x16
        _gpu("l40s", 48, 864, 32, 20, float32=91.6, tf32=183, bfloat16=362, float16=362, int8=733),  # PCIe 4.0 x16
    )
}


def cpu(threads: int) -> Device:
    """So many threads of a CPU, described by rough figures: what runs here is measured instead.

    The link is gloo's between two processes of one machine: on a server with two Zen 4 cores, half a round trip took
    65 µs for 8 bytes and 2.0 ms for 8 MB.
    """
    flops = {"float32": threads * _NOMINAL_CPU_FLOPS}
    return Device(f"cpu:{threads}", flops, threads * _NOMINAL_CPU_BANDWIDTH, None, 4 * GB, 70 * MICRO, threads)


def parse(text: str) -> tuple[Device, ...]:
    """``"4xh100"``, ``"1xh100,2xa100"``, ``"2xcpu:1"`` (a CPU's threads), or the path of a TOML file.

    Raises:
        OptcError: an unknown device, a count below 1, or a file that cannot be read; says what is known.
    """
    if text.endswith(".toml"):
        return read(Path(text))
    found: list[Device] = []
    for part in filter(None, (each.strip().lower() for each in text.split(","))):
        match = re.fullmatch(r"(?:(\d+)x)?([a-z][\w-]*)(?::(\d+))?", part)
        if match is None:
            raise OptcError(f"cannot read device '{part}'", "write COUNTxDEVICE, such as 4xh100 or 2xcpu:1")
        count, name, threads = int(match[1] or 1), match[2], match[3]
        if count < 1:
            raise OptcError(f"'{part}' are no devices", "give a count of 1 or more")
        found += [_named(name, None if threads is None else int(threads))] * min(count, MOST + 1)
        if len(found) > MOST:
            raise OptcError(f"'{text}' are more than {MOST} devices", "name fewer")
    if not found:
        raise OptcError("no devices given", "write COUNTxDEVICE, such as 4xh100 or 2xcpu:1")
    return tuple(found)


def _named(name: str, threads: int | None) -> Device:
    if name == "cpu":
        if threads is None or threads < 1:
            raise OptcError("a CPU needs its number of threads", "write cpu:THREADS, such as 2xcpu:1")
        return cpu(threads)
    if name not in KNOWN:
        close = get_close_matches(name, KNOWN, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(KNOWN)}, cpu:THREADS"
        raise OptcError(f"unknown device '{name}'", f"{hint} Others are described in a TOML file (docs/partition.md)")
    if threads is not None:
        raise OptcError(f"'{name}:{threads}': only a CPU has threads", f"write {name}")
    return KNOWN[name]


class _Entry(BaseModel):
    """One ``[[device]]`` of a TOML file."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    name: str
    count: int = Field(1, ge=1, le=MOST)
    base: str | None = None
    tflops: dict[str, float | int] | None = None
    bandwidth_gb_s: float | int | None = Field(None, gt=0)
    memory_gb: float | int | None = Field(None, gt=0)
    link_gb_s: float | int | None = Field(None, gt=0)
    link_us: float | int | None = Field(None, ge=0)


def read(path: Path) -> tuple[Device, ...]:
    """The devices of a TOML file: ``[[device]]`` tables, of which each may change a known device (``base``).

    Raises:
        OptcError: the file cannot be read, is no TOML, or has an entry that says too little or too much.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise OptcError(f"cannot read the devices of '{path}': {reason}", "give a TOML file or COUNTxDEVICE") from None
    except tomllib.TOMLDecodeError as error:
        raise OptcError(f"'{path}' is no TOML: {error}", "see docs/partition.md") from None
    entries = tables.pop("device", None)
    if tables or not isinstance(entries, list) or not entries:
        raise OptcError(f"'{path}' holds no list of devices", "write one [[device]] table for each kind")
    found: list[Device] = []
    for number, entry in enumerate(entries, 1):
        try:
            described = _Entry.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise OptcError(f"'{path}', device {number}: {key}: {first['msg']}", "see docs/partition.md") from None
        found += [_described(described, f"'{path}', device {number}")] * described.count
    return tuple(found)


def _described(entry: _Entry, where: str) -> Device:
    base: Device | None = None
    if entry.base is not None:
        if entry.base.endswith(".toml"):
            raise OptcError(f"{where}: base '{entry.base}' is a file", f"name one of {', '.join(KNOWN)}")
        (base,) = parse(entry.base)[:1]
    flops = {kind: value * TERA for kind, value in (entry.tflops or {}).items()}
    if any(value <= 0 for value in flops.values()):
        raise OptcError(f"{where}: tflops must be above 0", "see docs/partition.md")
    needed = {"tflops.float32": flops.get("float32"), "bandwidth_gb_s": entry.bandwidth_gb_s}
    needed |= {"link_gb_s": entry.link_gb_s, "link_us": entry.link_us}
    missing = [key for key, value in needed.items() if value is None]
    if base is None and missing:
        raise OptcError(f"{where}: {missing[0]} is missing", "give it, or a base such as base = 'h100'")

    def given(value: float | None, unit: float, known: float | None) -> float:
        return value * unit if value is not None else known or 0.0

    memory = round(entry.memory_gb * GB) if entry.memory_gb is not None else base.memory if base else None
    return Device(
        entry.name,
        {**(base.flops if base else {}), **flops},
        given(entry.bandwidth_gb_s, GB, base.bandwidth if base else None),
        memory,
        given(entry.link_gb_s, GB, base.link_bandwidth if base else None),
        given(entry.link_us, MICRO, base.link_latency if base else None),
        base.threads if base and base.name == entry.name else 0,  # described otherwise, it is not this machine's
    )
