"""Each rank says that it lives and watches its neighbour; the first to miss one ends them all."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch._C._distributed_c10d import Store

from optc.errors import OptcError
from optc.lowering.pipeline_ranks import FAILED, Signs, beat_key, process_ticks, silence

_STACK = 0.5
"""Seconds for a rank that does not answer to write where it is."""


class Watch(threading.Thread):
    """Counts this rank's beats up in the store, reads those of the next rank, and ends the process when any has failed.

    A rank that misses its neighbour's says so in the store, where all others find it: each rank is watched by exactly
    one, so there is one message. A neighbour on the same host is made to write where it is and is then killed, which
    launchers such as torchrun would do after half a minute only. It also ends this process when the one that started it
    is gone, so nothing is left behind.

    Args:
        store: a connection of its own: a call that waits holds a connection up.
        seconds: within which the job must have ended after a rank failed.
        computing_since: when the computation at work began, by :func:`time.monotonic`, or ``None``.
        limit: seconds that a computation may take; then this rank counts as hung and ends, with word of where it is.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        seconds: float,
        computing_since: Callable[[], float | None],
        limit: float,
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self._store, self._rank, self._world = store, rank, world
        self._silence, self._interval = silence(seconds), min(1.0, silence(seconds) / 8)
        self._computing_since, self._limit = computing_since, limit
        self._done = threading.Event()
        self._parent = os.getppid()
        faulthandler.register(signal.SIGUSR1, all_threads=True, chain=False)  # the main thread comes last
        store.set(_process_key(rank), json.dumps([_host(), os.getpid(), process_ticks(os.getpid())[0]]))
        store.add(beat_key(rank), 1)
        self._sibling: tuple[int, int] | None = None

    def stop(self) -> None:
        """The work is done: the others may end in any order."""
        self._done.set()
        with suppress(Exception):
            self._store.set(done_key(self._rank), "1")

    def run(self) -> None:
        """Beat and look until stopped."""
        neighbour = (self._rank + 1) % self._world
        signs, looked = Signs(), time.monotonic()
        while not self._done.wait(self._interval):
            if os.getppid() != self._parent:
                self._leave()  # whoever started this rank is gone
            try:
                if self._sibling is None and self._store.check([_process_key(neighbour)]):
                    host, pid, started = json.loads(self._store.get(_process_key(neighbour)))
                    self._sibling = (pid, started) if host == _host() else (0, 0)
                began = self._computing_since()
                if began is not None and time.monotonic() - began > self._limit:
                    self._give_up(time.monotonic() - began)
                self._store.add(beat_key(self._rank), 1)
                beat = self._store.add(beat_key(neighbour), 0)
                failed = self._store.check([FAILED])
            except Exception:
                if not self._done.is_set():
                    self._leave()  # the process where the ranks meet is gone
                return
            if time.monotonic() - looked > self._silence / 2:  # this process itself was held up
                signs = Signs()
            looked = time.monotonic()
            if failed:
                os._exit(1)
            pid, started = self._sibling or (0, 0)
            found, used = process_ticks(pid) if pid else (0, 0)
            if signs.silent(beat, used if found == started else 0) > self._silence and beat:
                self._report(neighbour, time.monotonic() - signs.heard)

    def _report(self, neighbour: int, seconds: float) -> None:
        if self._store.check([done_key(neighbour)]):
            return
        reason = f"has not answered for {seconds:.0f} s"
        if tell(self._store, neighbour, reason, ""):
            _say(f"rank {neighbour} (stage {neighbour}) {reason}, and the pipeline was ended")
            self._end_sibling(_STACK)
        os._exit(1)

    def _give_up(self, seconds: float) -> None:
        """End this process, whose main thread does not come to an end."""
        reason = f"has computed one microbatch for {seconds:.0f} s"
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        trace = "".join(traceback.format_stack(frame)).rstrip()
        if tell(self._store, self._rank, reason, trace):
            _say(f"rank {self._rank} (stage {self._rank}) {reason}, and the pipeline was ended\n{trace}")
        os._exit(1)

    def _leave(self) -> None:
        """End, with a neighbour that may be stopped and cannot."""
        self._end_sibling(0.0)
        os._exit(1)

    def _end_sibling(self, seconds: float) -> None:
        """Kill the neighbour if it is on this host; give it some seconds before to write where it is."""
        pid, started = self._sibling or (0, 0)
        with suppress(ProcessLookupError):
            if pid and process_ticks(pid)[0] == started:
                if seconds:
                    os.kill(pid, signal.SIGUSR1)
                    os.kill(pid, signal.SIGCONT)
                    time.sleep(seconds)
                os.kill(pid, signal.SIGKILL)


def done_key(rank: int) -> str:
    """Key of the store that says that a rank has done its work."""
    return f"optc/done/{rank}"


def tell(store: Store, rank: int, reason: str, trace: str) -> bool:
    """Leave word of the first failure; ``False`` if another one was first."""
    mine = json.dumps({"rank": rank, "reason": reason, "traceback": trace})
    return bool(store.compare_set(FAILED, "", mine) == mine.encode())


def tell_exception(store: Store, rank: int, error: BaseException) -> None:
    """Leave word of an exception of this rank, unless it only is a consequence of another rank's end.

    A broken connection is one: the rank that is to blame has a moment to be found out by whoever watches it.
    """
    if isinstance(error, RuntimeError) and "onnection" in str(error):
        time.sleep(3 * _STACK)
    trace = "".join(traceback.format_exception(error)).strip()
    last = trace.splitlines()[-1]
    if tell(store, rank, f"raised {last}", trace):
        known = isinstance(error, OptcError)  # says all there is to say
        _say(f"rank {rank} (stage {rank}) raised {last}, and the pipeline was ended" + ("" if known else f"\n{trace}"))


def _process_key(rank: int) -> str:
    return f"optc/process/{rank}"


def _host() -> str:
    """This host, even among containers of one name."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _say(text: str) -> None:
    print(f"optc.distributed: {text}", file=sys.stderr, flush=True)
