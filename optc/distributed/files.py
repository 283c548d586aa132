"""Ranks that run a file of images, or time batches of noise: under torchrun, on one host or several."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import zipfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from optc.distributed.rank import Place, StageRank
from optc.errors import DataError
from optc.lowering.agreement import as_array
from optc.lowering.pipeline_channel import array_dtype
from optc.lowering.pipeline_file import PipelineFile

_LOADING = timedelta(minutes=30)
"""How much later than another the first rank may have loaded its stage and read the inputs."""


def run_files(
    rank: StageRank, store: Store, place: Place, description: PipelineFile, arguments: argparse.Namespace
) -> None:
    """Run all of ``--input`` through the stages in batches and write ``--output``, or time ``--queries`` of noise.

    Only the first rank reads the inputs and only the last one writes; how many images there are goes over the store.

    Raises:
        DataError: an input file cannot be read or does not fit the model, or the output cannot be written.
        ArtifactError: the images cannot be divided into microbatches of a fixed size.
    """
    if rank.last and arguments.output and not arguments.output.parent.is_dir():
        raise DataError(f"there is no folder '{arguments.output.parent}' to write the outputs to", "make it first")
    batch = arguments.batch or description.batch
    inputs: list[Tensor] = []
    if rank.first:
        inputs = _read(arguments.input, rank) if arguments.input else _noise(rank, batch)
        description.parts(len(inputs[0]))  # before anything is computed
        store.set("optc/images", str(len(inputs[0])))
    store.wait(["optc/images"], _LOADING)
    images = int(store.get("optc/images"))
    if arguments.input:
        outputs = [
            _batch(rank, description, inputs, begin, min(batch, images - begin)) for begin in range(0, images, batch)
        ]
        if rank.last and arguments.output:
            _write(arguments.output, outputs)
        dist.barrier()  # each is watched by the one before it, until all are done
        return
    seconds = []
    dist.barrier()
    if rank.first:
        print(f"optc.distributed: {place.world} stages over {rank.transport} are ready", file=sys.stderr, flush=True)
    for query in range(1 + arguments.queries):
        dist.barrier()
        start = time.perf_counter()
        _batch(rank, description, inputs, 0, batch)
        dist.barrier()
        if query:  # the first one sets up connections and buffers
            seconds.append(time.perf_counter() - start)
    if rank.first and seconds:
        median = statistics.median(seconds)
        parts = description.parts(batch)
        print(
            f"{place.world} stages over {rank.transport}, batches of {batch} in {parts} microbatches:"
            f" {median * 1e3:.1f} ms, {batch / median:.1f} images/s (median of {len(seconds)})",
            flush=True,
        )


def _batch(
    rank: StageRank, description: PipelineFile, inputs: Sequence[Tensor], begin: int, count: int
) -> tuple[Tensor, ...]:
    return rank.run(count, description.parts(count), [tensor[begin : begin + count] for tensor in inputs])


def _read(paths: Sequence[Path], rank: StageRank) -> list[Tensor]:
    wires = rank.wires()
    if len(paths) != len(wires):
        raise DataError(
            f"the model takes {len(wires)} inputs, and {len(paths)} files were given", "give --input for each"
        )
    found = []
    for path, wire in zip(paths, wires, strict=True):
        try:
            with path.open("rb") as file:
                array: Any = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"cannot read '{path}': {error}", "give a .npy file of numbers") from error
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
            raise DataError(f"'{path}' is no array of numbers", "give a .npy file of numbers")
        if array.ndim != len(wire.shape) or array.shape[1:] != wire.shape[1:] or not len(array):
            expected = ", ".join(map(str, ("images", *wire.shape[1:])))
            raise DataError(f"'{path}' has the shape {array.shape}, the model takes ({expected})")
        found.append(torch.from_numpy(np.ascontiguousarray(array, array_dtype(wire.dtype))))
    counts = [len(each) for each in found]
    if len(set(counts)) > 1:
        files = ", ".join(f"'{path}' has {count}" for path, count in zip(paths, counts, strict=True))
        raise DataError(f"the inputs are not of as many images: {files}", "give files of one length")
    return found


def _noise(rank: StageRank, batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [(wire.dtype, torch.randn(wire.batched(batch), generator=generator)) for wire in rank.wires()]
    return [(noise if dtype.is_floating_point else noise.abs()).to(dtype) for dtype, noise in found]  # may be indices


def _write(path: Path, outputs: Sequence[tuple[Tensor, ...]]) -> None:
    """One array for each output, ``output_0`` and so on, the batches joined; whole or not at all."""
    parts = enumerate(zip(*outputs, strict=True))
    arrays: dict[str, Any] = {f"output_{index}": as_array(torch.cat(each)) for index, each in parts}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
    try:
        np.savez(temporary, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot write '{path}': {error.strerror or error}", "choose another --output") from error
