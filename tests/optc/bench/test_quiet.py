from __future__ import annotations

import gc
import subprocess
import sys

from optc.bench import quiet

SCRIPT = """
import threading, time
import numpy as np
from optc.bench import quiet

def wait():
    begin = time.perf_counter()
    with quiet.quiet_machine():
        return time.perf_counter() - begin

def work():
    matrix = np.ones((256, 256), np.float32)
    while not stop.is_set():
        matrix @ matrix

stop = threading.Event()
worker = threading.Thread(target=work)
worker.start()
print(wait())
stop.set()
worker.join()
with quiet.frozen_heap():  # as in a measurement: else it is the garbage collection that takes the time
    print(min(wait() for _ in range(5)))
"""


def test_waits_at_most_longer_than_openmp_workers_spin() -> None:
    assert quiet.SETTLE_SECONDS >= 0.2


def test_waits_until_threads_sleep_and_no_longer() -> None:
    # In a process of its own: other tests leave threads behind.
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    busy, asleep = map(float, done.stdout.split())
    assert busy >= quiet.SETTLE_SECONDS
    assert asleep < quiet.SETTLE_SECONDS / 2


def test_a_heap_that_the_caller_has_frozen_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with quiet.frozen_heap():
        pass
    assert gc.get_freeze_count() > 0.9 * frozen > 0, "a few may have died meanwhile"
    gc.unfreeze()
    with quiet.frozen_heap():
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
