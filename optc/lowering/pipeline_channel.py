"""Between the process that asks and its ranks: JSON headers and plain bytes over a socket; nothing is unpickled."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

import numpy as np
import torch

from optc.lowering.agreement import as_array
from optc.lowering.backend import Array

_LENGTH = struct.Struct("!Q")
_BUFFER = 1 << 20


class Channel:
    """One end of a connection. An array's bytes are read into its memory at once: copied once on each side."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        for direction in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connected.setsockopt(socket.SOL_SOCKET, direction, _BUFFER)

    def send(self, header: dict[str, Any]) -> None:
        """Send what JSON can hold.

        Raises:
            OSError: the other end is gone.
        """
        content = json.dumps(header).encode()
        self._socket.sendall(_LENGTH.pack(len(content)) + content)

    def receive(self) -> dict[str, Any]:
        """Wait for a header.

        Raises:
            EOFError: the other end is gone.
        """
        length = bytearray(_LENGTH.size)
        self._fill(memoryview(length))
        content = bytearray(_LENGTH.unpack(length)[0])
        self._fill(memoryview(content))
        header: dict[str, Any] = json.loads(content)
        return header

    def send_array(self, array: Array) -> None:
        """Send the bytes of a contiguous array; the other end knows its shape and type.

        Raises:
            OSError: the other end is gone.
        """
        self._socket.sendall(_bytes(array))

    def receive_into(self, array: Array) -> None:
        """Fill a contiguous array.

        Raises:
            EOFError: the other end is gone.
        """
        self._fill(_bytes(array))

    def close(self) -> None:
        """End the connection: the other end notices."""
        self._socket.close()

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError("the other end of the connection is gone")
            view = view[count:]


def array_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What values of a type go as: float32 for types that numpy has not."""
    return as_array(torch.empty(0, dtype=dtype)).dtype


def _bytes(array: Array) -> memoryview:
    return array.reshape(-1).view("uint8").data
