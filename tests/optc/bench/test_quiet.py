from __future__ import annotations

from optc.bench import quiet


def test_settles_longer_than_openmp_workers_spin() -> None:
    assert quiet.SETTLE_SECONDS >= 0.2
