"""A rank that answers queries of the process that started it, over a connection that carries nothing but bytes."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optc.distributed.rank import StageRank
from optc.lowering.agreement import as_array
from optc.lowering.backend import Array
from optc.lowering.pipeline_channel import Channel, array_dtype
from optc.stages import Wire


def serve(rank: StageRank, descriptor: int, base_bytes: int) -> None:
    """Answer queries until the connection ends.

    Every rank is told the size of each query, the first one gets the inputs, and the last one gives the outputs.

    Args:
        descriptor: of this end of the connection.
        base_bytes: memory allocated before the stage was read.
    """
    with socket.socket(fileno=descriptor) as connected:
        channel = Channel(connected)
        channel.send(
            {
                "provider": rank.runner.provider,
                "precision": rank.runner.precision,
                "transport": rank.transport,
                "base_bytes": base_bytes,
            }
        )
        while (query := _next(channel)) is not None:
            batch = int(query["batch"])
            wires = rank.wires() if rank.first else []
            outputs = rank.run(batch, int(query["microbatches"]), [_receive(channel, wire, batch) for wire in wires])
            if rank.last:
                _send(channel, outputs)


def _next(channel: Channel) -> dict[str, Any] | None:
    try:
        return channel.receive()
    except (EOFError, ConnectionResetError):
        return None


def _receive(channel: Channel, wire: Wire, batch: int) -> Tensor:
    """One input; types that numpy has not come as float32."""
    array: Array = np.empty(wire.batched(batch), array_dtype(wire.dtype))
    channel.receive_into(array)
    return torch.from_numpy(array)


def _send(channel: Channel, outputs: tuple[Tensor, ...]) -> None:
    arrays = list(map(as_array, outputs))
    channel.send({"outputs": [[each.shape, str(each.dtype)] for each in arrays]})
    for each in arrays:
        channel.send_array(each)
