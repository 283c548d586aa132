"""Beats, and what counts as a sign of life without them."""

from __future__ import annotations

import time

import pytest
from torch._C._distributed_c10d import HashStore

from optc.distributed.watch import Watch, tell
from optc.lowering import pipeline_ranks
from optc.lowering.pipeline_ranks import Signs, beat_key


def beats(store: HashStore, rank: int) -> int:
    return store.add(beat_key(rank), 0)


def test_a_rank_beats_until_it_is_done() -> None:
    store = HashStore()
    watch = Watch(store, 0, 2, seconds=1.0, computing_since=time.monotonic, limit=60.0)
    assert beats(store, 0) == 1  # heard of before it is ready
    watch.start()
    try:
        until = time.monotonic() + 30
        while beats(store, 0) < 3:
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        watch.stop()
        watch.join()
    assert store.check(["optc/done/0"])


def test_use_of_the_cpu_is_a_sign_of_life_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pipeline_ranks.time, "monotonic", lambda: now[0])
    signs = Signs()
    found = []
    for second, beat, used in ((5, 1, 0), (9, 1, 0), (50, 1, 3), (120, 1, 4), (130, 1, 9), (135, 1, 9), (136, 2, 9)):
        now[0] = float(second)
        found.append(signs.silent(beat, used))
    assert found == [0, 4, 0, 0, 10, 15, 0]


def test_only_the_first_failure_is_told() -> None:
    store = HashStore()
    assert tell(store, 1, "has not answered", "")
    assert not tell(store, 0, "raised ConnectionError", "")
