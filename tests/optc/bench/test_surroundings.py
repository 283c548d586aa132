from __future__ import annotations

import json

from optc import Target
from optc.bench.surroundings import differences, surroundings


def test_the_same_surroundings_do_not_differ_and_are_json() -> None:
    here = surroundings(Target(threads=1))
    assert differences(here, json.loads(json.dumps(surroundings(Target(threads=1))))) == []
    assert here["packages"]["mlcommons-loadgen"]


def test_threads_versions_and_limits_are_named() -> None:
    one = surroundings(Target(threads=1), {"cpus": [0, 1], "memory_limit_bytes": None})
    other = surroundings(Target(threads=2), {"cpus": [0], "memory_limit_bytes": 10**9})
    other["packages"] = {**other["packages"], "torch": "0.1", "numpy": "0.2"}
    found = differences(one, other)
    assert "threads 1 and 2" in found
    assert "CPUs 0, 1 and 0" in found
    assert "memory limit bytes None and 1000000000" in found
    assert f"torch {one['packages']['torch']} and 0.1" in found
    assert len(found) == 5


def test_a_package_that_only_one_has_is_named() -> None:
    assert differences({"packages": {"a": "1"}}, {"packages": {}}) == ["a 1 and missing"]
