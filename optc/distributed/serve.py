"""A rank that answers queries of the process that started it, over a connection that carries nothing but bytes."""

from __future__ import annotations

import json
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from optc.distributed.rank import StageRank


def serve(rank: StageRank, descriptor: int, base_bytes: int) -> None:
    """Answer queries until the connection ends.

    Every rank is told the size of each query, the first one gets the inputs, and the last one gives the outputs.

    Args:
        descriptor: of this end of the connection.
        base_bytes: memory allocated before the stage was read.
    """
    with Connection(descriptor) as connection:
        ready = {
            "provider": rank.runner.provider,
            "precision": rank.runner.precision,
            "transport": rank.transport,
            "base_bytes": base_bytes,
        }
        connection.send_bytes(json.dumps(ready).encode())
        while (query := _next(connection)) is not None:
            batch = int(query["batch"])
            inputs = (
                [_receive(connection, wire.sizes(batch), wire.dtype) for wire in rank.wires()] if rank.first else []
            )
            outputs = rank.run(batch, int(query["microbatches"]), inputs)
            if rank.last:
                _send(connection, outputs)


def _next(connection: Connection) -> dict[str, Any] | None:
    try:
        told: dict[str, Any] = json.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        return None
    return told


def _receive(connection: Connection, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One input; bfloat16, which numpy has not, comes as float32."""
    tensor = torch.empty(sizes, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    connection.recv_bytes_into(tensor.view(-1).view(torch.uint8).numpy().data)
    return tensor


def _send(connection: Connection, outputs: tuple[Tensor, ...]) -> None:
    arrays = [(each.float() if each.dtype == torch.bfloat16 else each).cpu().contiguous().numpy() for each in outputs]
    connection.send_bytes(json.dumps({"outputs": [[each.shape, str(each.dtype)] for each in arrays]}).encode())
    for each in arrays:
        connection.send_bytes(each.reshape(-1).view("uint8").data)
