from __future__ import annotations

import os
from pathlib import Path

import pytest

from optc import threads
from optc.threads import available_threads, cpu_quota, most_threads


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Files of a machine of four cores with two hardware threads each (0 and 4, 1 and 5, ...), as Linux writes them."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    return tmp_path


def test_here_they_are_at_most_those_of_the_affinity_mask() -> None:
    assert 1 <= available_threads() <= most_threads() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("mask", "available", "most"), [(range(8), 4, 8), (range(4), 4, 4), ((0, 4), 1, 2), ((0, 4, 1), 2, 3)]
)
@pytest.mark.usefixtures("cpus")
def test_a_core_has_one_thread(
    monkeypatch: pytest.MonkeyPatch, mask: tuple[int, ...], available: int, most: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(mask))
    assert (available_threads(), most_threads()) == (available, most)


@pytest.mark.parametrize(
    ("text", "quota", "available", "most"),
    [
        ("150000 100000", 1.5, 1, 1),
        ("50000 100000", 0.5, 1, 1),
        ("350000 100000", 3.5, 3, 3),
        ("600000 100000", 6.0, 4, 6),
        ("6400000 100000", 64.0, 4, 8),
        ("max 100000", None, 4, 8),
        ("", None, 4, 8),
    ],
)
def test_a_containers_quota_counts(
    monkeypatch: pytest.MonkeyPatch, cpus: Path, text: str, quota: float | None, available: int, most: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (cpus / "cpu.max").write_text(text + "\n")
    assert (cpu_quota(), available_threads(), most_threads()) == (quota, available, most)


def test_where_the_system_does_not_tell_every_cpu_is_a_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    assert available_threads() == most_threads() == 3
