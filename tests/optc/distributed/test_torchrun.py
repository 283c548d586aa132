"""``torchrun -m optc.distributed``: real agents and ranks, on one host and on what looks like two."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._C._distributed_c10d import HashStore

import optc
from optc.distributed.files import _noise, _read, run_files
from optc.distributed.rank import Place
from optc.errors import OptcError
from optc.lowering.pipeline import PipelineBackend
from optc.lowering.pipeline_file import read_pipeline, write_pipeline
from optc.lowering.pipeline_ranks import TIMEOUT_VARIABLE
from optc.program import Program
from optc.stages import Wire
from optc.target import Target

Cut = Callable[[Program, int], Program]


class Made:
    """Two stages of a small model, as :mod:`optc.distributed` takes them, and the program."""

    def __init__(self, cut: Cut, folder: Path) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
        self.folder = folder
        self.program = cut(optc.capture(model, (torch.randn(2, 8),)), 2)
        target = Target(threads=2, batch=4)
        description, _, _ = PipelineBackend(microbatches=2)._lower_stages(self.program, target, folder)
        write_pipeline(folder, description)


@pytest.fixture(scope="module")
def made(cut: Cut, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(cut, tmp_path_factory.mktemp("stages"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def children(pid: int) -> dict[int, int]:
    """Processes that another started, by what ``RANK`` says in their environment."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                entries = (folder / "environ").read_bytes().split(b"\0")
                found[int(next(e for e in entries if e.startswith(b"RANK=")).removeprefix(b"RANK="))] = int(folder.name)
        except (OSError, StopIteration):
            continue
    return found


def test_two_hosts_run_a_file_of_images(made: Made, tmp_path: Path) -> None:
    """Two agents on this machine, which know of each other by an address only, each with its own stage's files."""
    hosts = [
        shutil.copytree(made.folder, tmp_path / f"host-{node}", ignore=shutil.ignore_patterns(f"stage-{1 - node}"))
        for node in range(2)
    ]
    images = np.random.default_rng(0).standard_normal((10, 8)).astype(np.float32)  # two batches and a half
    np.save(tmp_path / "x.npy", images)
    files = ("--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "y.npz"))
    where = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    with ExitStack() as stack:
        agents = [
            stack.enter_context(
                torchrun(*where, "--node-rank", str(node), "-m", "optc.distributed", str(hosts[node]), *files)
            )
            for node in range(2)
        ]
        said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    with np.load(tmp_path / "y.npz", allow_pickle=False) as found:
        expected = made.program.run(torch.from_numpy(images))[0].numpy()
        np.testing.assert_allclose(found["output_0"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_outputs_that_have_no_folder_end_the_job_in_one_line(made: Made, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 8), np.float32))
    files = ("--input", str(tmp_path / "x.npy"), "--output", str(tmp_path / "none" / "y.npz"))
    with torchrun("--standalone", "--nproc-per-node", "2", "-m", "optc.distributed", str(made.folder), *files) as agent:
        said, _ = agent.communicate(timeout=120)
    assert agent.returncode != 0
    assert said.count("optc.distributed: rank 1 (stage 1) raised") == 1
    assert "there is no folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


class First:
    """The first of the ranks, as far as reading inputs goes."""

    first, last = True, False

    def wires(self) -> list[Wire]:
        return [Wire("x", (None, 8), torch.float32)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npz", np.zeros((4, 8)), "is no array of numbers"),
        ("x.npy", np.full((4, 8), "text"), "is no array of numbers"),
        ("x.npy", np.float32(1), r"has the shape \(\), the model takes \(images, 8\)"),
        ("x.npy", b"", "cannot read"),
        ("x.npy", b"PK\x03\x04", "cannot read"),
        ("x.npy", np.zeros((5, 8)), "the stages take 2 images at a time, which do not divide a batch of 5"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_anything_runs(
    made: Made, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        (np.savez if path.suffix == ".npz" else np.save)(path, content)
    arguments = argparse.Namespace(input=[path], output=None, batch=None)
    fixed = read_pipeline(made.folder).model_copy(update={"rows": 2})
    with pytest.raises(OptcError, match=message):
        run_files(First(), HashStore(), Place(0, 2, 0, 2, "", 1, False), fixed, arguments)  # type: ignore[arg-type]


def test_numbers_of_any_type_are_read(tmp_path: Path) -> None:
    images = np.arange(16).reshape(2, 8)
    for kind in (">f4", "f8", "u2", "longdouble"):
        np.save(tmp_path / "x.npy", images.astype(kind))
        (found,) = _read([tmp_path / "x.npy"], First())  # type: ignore[arg-type]
        assert torch.equal(found, torch.from_numpy(images).float())


def test_a_batch_is_as_large_as_planned(made: Made) -> None:
    plan = read_pipeline(made.folder)
    first = plan.stages[0].model_copy(update={"predicted": {"microbatch": 4}})
    assert plan.batch == 2
    assert plan.model_copy(update={"stages": (first, plan.stages[1])}).batch == 8
    assert plan.model_copy(update={"rows": 3}).batch == 6


@pytest.mark.slow
def test_a_rank_that_stops_after_the_one_before_it_is_done_ends_the_job(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from optc.lowering.eager import EagerRunner\n"
        "    EagerRunner.run_tensors = lambda self, *inputs: os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    np.save(tmp_path / "x.npy", np.zeros((1, 8), np.float32))
    work = ("-m", "optc.distributed", str(made.folder), "--input", str(tmp_path / "x.npy"), "--timeout", "3")
    with torchrun("--standalone", "--nproc-per-node", "2", *work) as agent:
        try:
            said, _ = agent.communicate(timeout=120)
        finally:
            agent.kill()
    assert agent.returncode != 0
    assert "rank 1 (stage 1) has not answered for" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "0"), "--batch 0 is too few — give 1 or more"),
        (("--queries", "0"), "--queries 0 is too few"),
        (("--output", "y.npz"), "--output without --input"),
        (("--timeout", "-1"), "is no number of seconds, 1 to 86400"),
        (("--timeout", "inf"), "is no number of seconds, 1 to 86400"),
    ],
)
def test_bad_options_are_one_line(
    made: Made,
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from optc.distributed.__main__ import main

    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", TIMEOUT_VARIABLE: "10"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["optc.distributed", str(made.folder), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_stopped_rank_ends_the_job_with_its_name_and_where_it_was(made: Made) -> None:
    work = ("-m", "optc.distributed", str(made.folder), "--queries", "100000000", "--timeout", "3")
    with torchrun("--standalone", "--nproc-per-node", "2", *work) as agent:
        try:
            assert agent.stdout is not None
            said = ""
            while "are ready" not in said:
                line = agent.stdout.readline()
                assert line, said
                said += line
            ranks = children(agent.pid)
            os.kill(ranks[1], signal.SIGSTOP)
            start = time.monotonic()
            said, _ = agent.communicate(timeout=60)
            seconds = time.monotonic() - start
        finally:
            agent.kill()
    assert agent.returncode != 0
    assert said.count("and the pipeline was ended") == 1
    assert "rank 1 (stage 1) has not answered for" in said
    assert "most recent call first" in said
    assert seconds < 3 + 40  # of which the machine and torchrun may need some for themselves
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def test_the_number_of_ranks_is_that_of_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OptcError, match="was started alone — start it with torchrun --nproc-per-node 2"):
        Place.here(2)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(OptcError, match="has 2 stages, and 3 ranks were started — start 2"):
        Place.here(2)
    assert Place.here(3).own_store


def test_a_port_in_use_and_nobody_there_are_one_line_each() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OptcError, match=rf"cannot listen at 127.0.0.1:{port}: the port is in use"):
            Place(0, 2, 0, 2, "127.0.0.1", port, own_store=True).store(1.0, serve=True)
    with pytest.raises(OptcError, match=rf"rank 1 reached nobody at 127.0.0.1:{port}"):
        Place(1, 2, 1, 2, "127.0.0.1", port, own_store=False).store(1.0)


def test_noise_for_integers_may_be_indices() -> None:
    rank: Any = SimpleNamespace(wires=lambda: [Wire("x", (None, 4), torch.int64), Wire("y", (None, 4), torch.float32)])
    indices, numbers = _noise(rank, 64)
    assert (indices.dtype, indices.shape, int(indices.min())) == (torch.int64, (64, 4), 0)
    assert numbers.min() < 0
