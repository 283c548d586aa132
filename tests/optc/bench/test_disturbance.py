from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from optc.bench import disturbance
from optc.bench.disturbance import Watch, busy_warning

_PROC_STAT = "cpu  0 0 0 0 0 0 0 0 0 0\n" + "".join(
    f"cpu{number} {{busy}} 0 0 0 0 0 0 {{steal}} 0 0\n" for number in range(512)
)


class _System:
    """A machine whose counters the test sets; the parsing is the real one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stat, self.quota, self.cpus = folder / "stat", folder / "cpu.stat", folder / "cpus"
        (self.cpus / "cpu0" / "thermal_throttle").mkdir(parents=True)
        read = disturbance._read
        monkeypatch.setattr(disturbance, "_read", lambda path: read(self.stat if path == Path("/proc/stat") else path))
        monkeypatch.setattr(disturbance, "_QUOTA", self.quota)
        monkeypatch.setattr(disturbance, "_CPUS", self.cpus)
        monkeypatch.setattr("os.sysconf", lambda name: 100)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3})
        monkeypatch.setattr("os.times", lambda: _Times())
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        self.set()

    def set(self, seconds: float = 0.0, busy: int = 0, steal: int = 0, heat: int = 0, quota: int = 0) -> None:
        self.now = seconds
        self.stat.write_text(_PROC_STAT.format(busy=busy, steal=steal))
        self.quota.write_text(f"usage_usec 5\nnr_periods 9\nnr_throttled {quota}\nthrottled_usec 7\n")
        (self.cpus / "cpu0" / "thermal_throttle" / "core_throttle_count").write_text(f"{heat}\n")


class _Times:
    user, system, children_user, children_system = 4.0, 0.0, 0.0, 0.0


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _System:
    return _System(tmp_path, monkeypatch)


def test_what_others_take_of_this_process_cpus_is_a_share(system: _System) -> None:
    watch = Watch()
    with watch:
        system.set(seconds=10.0, busy=300)  # two CPUs, 3 s each, of 10 s each
    assert watch.others == pytest.approx(0.3)
    assert watch.warnings() == ["other processes took 30% of the CPUs meanwhile"]


def test_what_happens_between_blocks_does_not_count(system: _System) -> None:
    watch = Watch()
    system.set(seconds=10.0, busy=1000)
    with watch:
        system.set(seconds=20.0, busy=1050)
    system.set(seconds=30.0, busy=2050)
    with watch:
        system.set(seconds=40.0, busy=2100)
    assert watch.others == pytest.approx(0.05)
    assert watch.warnings() == []


def test_heat_quota_and_the_hypervisor_are_named(system: _System) -> None:
    watch = Watch()
    with watch:
        system.set(seconds=10.0, steal=100, heat=2, quota=3)
    assert watch.warnings() == [
        "the hypervisor took 10% of the CPUs meanwhile",
        "the CPUs were throttled for heat 2 times meanwhile",
        "the container ran into its CPU quota 3 times meanwhile",
    ]


def test_a_system_that_tells_nothing_gives_no_warning(system: _System) -> None:
    system.stat.unlink()
    watch = Watch()
    with watch:
        system.now = 10.0
    assert watch.others == 0.0
    assert watch.warnings() == []


def test_this_machine_can_be_read() -> None:
    watch = Watch()
    with watch:
        sum(range(1000))
    assert watch._sums["total"] > 0


def test_what_running_child_processes_take_is_this_process_own() -> None:
    work = (
        "import time; input(); end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", work], **pipes) as child, Watch() as watch:  # type: ignore[call-overload]
        assert child.stdin is not None
        assert child.stdout is not None
        print(file=child.stdin, flush=True)
        child.stdout.readline()
        watch.__exit__()
        assert watch._sums["own"] >= 0.25
        print(file=child.stdin, flush=True)


def test_the_load_that_this_process_made_is_no_reason_to_warn(system: _System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (9.0, 0.0, 0.0))
    monkeypatch.setattr("time.sleep", lambda seconds: system.set(seconds=1.0, busy=10))
    assert busy_warning() is None
    monkeypatch.setattr("time.sleep", lambda seconds: system.set(seconds=2.0, busy=110))
    warning = busy_warning()
    assert warning is not None
    assert "other processes took 100% of the CPUs as the measurement began" in warning
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 0.0, 0.0))
    assert busy_warning() is None, "nobody looks where nothing ran"
