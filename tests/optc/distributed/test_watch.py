"""Beats: they stop when a computation hangs, although the thread that beats does not."""

from __future__ import annotations

import time

from torch._C._distributed_c10d import HashStore

from optc.distributed.watch import Watch, tell
from optc.lowering.pipeline_ranks import beat_key


def beats(store: HashStore, rank: int) -> int:
    return store.add(beat_key(rank), 0)


def test_a_rank_that_computes_without_end_is_not_heard_of_any_more() -> None:
    store = HashStore()
    began: list[float] = []
    watch = Watch(store, 0, 2, seconds=1.0, computing_since=lambda: began[0] if began else None, limit=60.0)
    assert beats(store, 0) == 1  # heard of before it is ready
    watch.start()
    try:
        until = time.monotonic() + 30
        while beats(store, 0) < 3:
            assert time.monotonic() < until
            time.sleep(0.02)
        began.append(time.monotonic() - 61.0)
        time.sleep(0.3)  # a beat may have been on its way
        before = beats(store, 0)
        time.sleep(0.5)
        assert beats(store, 0) == before
    finally:
        watch.stop()
        watch.join()
    assert store.check(["optc/done/0"])


def test_only_the_first_failure_is_told() -> None:
    store = HashStore()
    assert tell(store, 1, "has not answered", "")
    assert not tell(store, 0, "raised ConnectionError", "")
