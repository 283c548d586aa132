"""The processes of a pipeline on this machine: started, watched, and all ended when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from optc.errors import BackendError
from optc.lowering.pipeline_channel import Channel
from optc.target import Target

TIMEOUT_VARIABLE = "OPTC_PIPELINE_TIMEOUT"
TIMEOUT = 10.0
"""Seconds within which the whole job ends after a rank died or stopped answering, unless the variable says more."""
_LONGEST = 86_400.0
JOB_VARIABLE = "OPTC_PIPELINE_JOB"
"""Tells a rank that it serves queries of this process: its connection's descriptor and its target, as JSON."""
FAILED = "optc/failed"
"""Key of the store under which the first rank that fails leaves why, as JSON."""
COMPUTING_LIMIT = 120.0
"""Seconds that a microbatch, or loading a stage, may take before the rank counts as hung."""
_STARTING = 120.0
"""Seconds for a rank to start Python and import PyTorch."""
_DYING = 0.2
"""Seconds for the ranks that die of another's death to die too: the one ended by a signal is to blame."""
_THREAD = ("Current thread 0x", "Thread 0x")
"""How the fault handler begins what it writes of a thread."""
_STACK = 0.5
"""Seconds for a rank that does not answer to write where it is."""


def timeout() -> float:
    """Seconds within which a job ends after a rank failed.

    Raises:
        BackendError: the variable is not a number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds <= _LONGEST:
        raise BackendError(f"{TIMEOUT_VARIABLE}={text} is no number of seconds, 1 to {_LONGEST:g}")
    return seconds


def beat_key(rank: int) -> str:
    """Key of the store that a rank counts up while it lives."""
    return f"optc/beat/{rank}"


def silence(seconds: float) -> float:
    """How long a rank may not be heard of, given the time within which the job must have ended."""
    return 0.7 * seconds


def process_ticks(pid: int) -> tuple[int, int]:
    """When a process of this host began, and how long it has used CPUs since, in ticks; zeros if there is none."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]), int(fields[11]) + int(fields[12])
    return 0, 0


class Signs:
    """Signs of life of one rank: its beats, and without them the CPU time that it uses, if it is on this host.

    Compiled code may hold Python's lock, without which no thread can beat, for as long as it computes or is loaded.
    """

    def __init__(self) -> None:
        self._beat, self._used = -1, 0
        self.heard = self._lived = time.monotonic()

    def silent(self, beat: int, used: int = 0) -> float:
        """Seconds without a sign of life.

        Args:
            beat: the rank's count.
            used: CPU time that its process has used; a sign of life until :data:`COMPUTING_LIMIT` after a beat.
        """
        now = time.monotonic()
        if beat != self._beat:
            self.heard = self._lived = now
        elif used != self._used and now - self.heard < COMPUTING_LIMIT:
            self._lived = now
        self._beat, self._used = beat, used
        return now - self._lived


def local_store(world: int, seconds: float) -> TCPStore:
    """A store on a free port that only this machine reaches: one that PyTorch opens itself listens at every address.

    Args:
        seconds: how long to wait for what is asked of it.
    """
    host = "127.0.0.1"
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    return TCPStore(
        host,
        port,
        world,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
        master_listen_fd=listening.detach(),
    )


class LocalRanks:
    """One process a stage, each with a connection to this one. The store that they meet at is this process's.

    Attributes:
        failure: why all were ended; empty while they run.
        connections: to each rank.
    """

    def __init__(self, folder: Path, targets: Sequence[Target]) -> None:
        self.failure = ""
        self.traceback = ""
        self._timeout = timeout()
        self._logs = tempfile.TemporaryDirectory(prefix="optc-pipeline-")
        world = len(targets)
        self._store = local_store(world, self._timeout)
        self.connections: list[Channel] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing, self._ended = threading.Event(), threading.Event()
        try:
            for rank, target in enumerate(targets):
                self._start(rank, world, folder, target)
        except BaseException:
            _kill(self._processes)
            raise
        self._signs = [Signs() for _ in self._processes]
        self._finalizer = weakref.finalize(self, _kill, self._processes)
        self._monitor = threading.Thread(target=_watch, args=(weakref.ref(self), self._closing), daemon=True)
        self._monitor.start()

    def _start(self, rank: int, world: int, folder: Path, target: Target) -> None:
        mine, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": str(target.threads),
            # This process watches them; they watch each other besides.
            TIMEOUT_VARIABLE: str(min(2 * self._timeout, _LONGEST)),
            JOB_VARIABLE: json.dumps({"descriptor": theirs.fileno(), "target": asdict(target)}),
        }
        if Path("/sys/class/net/lo").exists():
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks the network what this host is called
        with self._log(rank).open("wb") as log, theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "optc.distributed", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for this process, which ends them in order
            )
        self._processes.append(process)
        self.connections.append(Channel(mine))

    @property
    def pids(self) -> list[int]:
        """The process of each rank."""
        return [process.pid for process in self._processes]

    def raise_failure(self) -> None:
        """Raise why the ranks were ended, once a connection has broken.

        Raises:
            BackendError: always; with rank, stage and last traceback.
        """
        self._ended.wait(self._timeout + 5)
        error = BackendError(self.failure or "a rank closed its connection without a word")
        if self.traceback:
            error.add_note(self.traceback)
        raise error

    def abandon(self, why: str) -> None:
        """End all at once: a query was interrupted, and what they would send next belongs to nobody."""
        self.failure = self.failure or why
        self._closing.set()
        _kill(self._processes)
        self._ended.set()

    def close(self) -> None:
        """Ask all to end; kill what has not within a second."""
        self.failure = self.failure or "this runner is closed: load the model again"
        self._closing.set()
        for connection in self.connections:
            with suppress(OSError):
                connection.close()  # the end of its connection ends a rank
        until = time.monotonic() + 1.0
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self._finalizer()
        self._monitor.join()
        self._ended.set()
        self._logs.cleanup()

    def look(self) -> bool:
        """End all if one has failed.

        Returns:
            Whether they were ended.
        """
        if self._closing.is_set():
            return True
        if any(process.poll() is not None for process in self._processes):
            time.sleep(_DYING)
            self._fail(*self._why_dead())
            return True
        for rank, (process, sign) in enumerate(zip(self._processes, self._signs, strict=True)):
            beat = self._store.add(beat_key(rank), 0)
            silent = sign.silent(beat, process_ticks(process.pid)[1] if beat else 0)
            if not beat and silent > _STARTING:
                self._fail(rank, f"has not started within {_STARTING:.0f} s", self._last_traceback(rank))
                return True
            if beat and silent > silence(self._timeout):
                self.failure = f"rank {rank} (stage {rank}) does not answer"  # it may once it is woken: too late
                reason = f"has not answered for {time.monotonic() - sign.heard:.0f} s"
                self._fail(rank, reason, self._stack(rank))
                return True
        return False

    def _why_dead(self) -> tuple[int, str, str]:
        for rank, process in enumerate(self._processes):
            status = process.poll()
            if status is not None and status < 0:
                return rank, f"was ended by {signal.Signals(-status).name}", self._last_traceback(rank)
        if self._store.check([FAILED]):
            told: dict[str, Any] = json.loads(self._store.get(FAILED))
            return int(told["rank"]), str(told["reason"]), str(told["traceback"])
        rank, status = next((r, s) for r, p in enumerate(self._processes) if (s := p.poll()) is not None)
        return rank, f"ended with status {status}", self._last_traceback(rank)

    def _stack(self, rank: int) -> str:
        """Where a rank is: Python's fault handler writes it, also of a process that was stopped."""
        for each in (signal.SIGUSR1, signal.SIGCONT):
            with suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, each)
        time.sleep(_STACK)
        return self._last_traceback(rank)

    def _log(self, rank: int) -> Path:
        return Path(self._logs.name, f"rank-{rank}.log")

    def _last_traceback(self, rank: int) -> str:
        lines = self._log(rank).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        begins = [i for i, line in enumerate(lines) if line.startswith(("Traceback", *_THREAD))]
        return "\n".join(lines[begins[-1] :] if begins else lines[-1:])

    def _fail(self, rank: int, reason: str, traceback: str) -> None:
        last = f"; its last words: {_brief(traceback)}" if traceback else ""
        self.failure = f"rank {rank} (stage {rank}) {reason}, and the pipeline was ended{last}"
        self.traceback = traceback
        _kill(self._processes)
        self._ended.set()


def _brief(traceback: str) -> str:
    """The end of a traceback on one line."""
    lines = [line.strip() for line in traceback.strip().splitlines() if line.strip(" ^~")]
    if lines and lines[0].startswith(_THREAD):
        lines = lines[1:5]  # innermost first
    return " / ".join(lines[-6:])


def _watch(reference: weakref.ref[LocalRanks], closing: threading.Event) -> None:
    while not closing.wait(0.1):
        ranks = reference()
        if ranks is None or ranks.look():
            return
        del ranks


def _kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs, stopped processes too, and wait for it."""
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
