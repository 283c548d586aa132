from __future__ import annotations

import threading
import time

import numpy as np

from optc.bench import quiet


def test_waits_at_most_longer_than_openmp_workers_spin() -> None:
    assert quiet.SETTLE_SECONDS >= 0.2


def test_waits_until_threads_sleep_and_no_longer() -> None:
    stop = threading.Event()

    def work() -> None:
        matrix = np.ones((256, 256), np.float32)
        while not stop.is_set():
            matrix @ matrix

    worker = threading.Thread(target=work)
    worker.start()
    begin = time.perf_counter()
    with quiet.quiet_machine():
        busy = time.perf_counter() - begin
    stop.set()
    worker.join()
    assert busy >= quiet.SETTLE_SECONDS
    asleep = []
    for _ in range(5):
        begin = time.perf_counter()
        with quiet.quiet_machine():
            asleep.append(time.perf_counter() - begin)
    assert min(asleep) < quiet.SETTLE_SECONDS / 2
