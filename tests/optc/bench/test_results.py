from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from optc.bench import statistics
from optc.bench.results import Block, CandidateResult, conclude, fastest
from optc.target import Target


def test_results_do_not_import_torch() -> None:
    code = "import sys, optc.bench.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def result(name: str, milliseconds: list[float]) -> CandidateResult:
    """Five queries in each block, within a hundredth of the milliseconds that are given for it."""
    latencies = [[round(each * 1e6 * (1 + step / 200)) for step in (-2, -1, 0, 1, 2)] for each in milliseconds]
    blocks = tuple(Block(tuple(each), 0, None) for each in latencies)  # type: ignore[arg-type]
    percentiles, spread = statistics.percentiles(latencies), statistics.block_spread(latencies)
    return CandidateResult(name, "", "float32", False, 0.0, blocks, percentiles, spread, None, ())


def test_more_blocks_on_a_slower_machine_make_no_loser() -> None:
    steady = [1.0, 1.1, 1.0, 0.9, 1.0]
    winner = result("winner", [*steady, *[1.3] * 8])
    loser = result("loser", [1.1 * each for each in steady])
    assert loser.percentiles.p50_ns < winner.percentiles.p50_ns  # type: ignore[union-attr]
    for results in ([winner, loser], [loser, winner]):
        assert fastest(results, interleaved=True) is winner
        assert fastest(results, interleaved=False) is loser, "no blocks of the same time"
    assert fastest([replace(winner, error="broken"), loser], interleaved=True) is loser
    assert fastest([replace(loser, error="broken")], interleaved=True) is None


def test_what_returns_nan_is_kept_only_where_all_do() -> None:
    quick, slow = result("quick", [1.0] * 5), result("slow", [2.0] * 5)
    broken = replace(quick, blocks=tuple(replace(block, nonfinite_queries=1) for block in quick.blocks))
    assert broken.nonfinite_queries == 5
    assert fastest([broken, slow], interleaved=True) is slow
    assert fastest([broken], interleaved=True) is broken


def test_other_options_have_to_gain_more_than_a_machine_drifts_where_blocks_took_no_turns() -> None:
    plain = result("plain", [1.0, 1.001, 0.999] * 3)
    other = replace(result("other", [0.98, 0.981, 0.979] * 3), instead_of="plain")
    assert fastest([plain, other], interleaved=True) is other
    assert fastest([plain, other], interleaved=False) is plain


@pytest.mark.parametrize(
    ("blocks", "wide", "uneven"), [((6, 6), False, False), ((14, 2), True, True), ((3, 3), True, False)]
)
def test_how_many_blocks_a_ratio_rests_on_is_told(blocks: tuple[int, int], wide: bool, uneven: bool) -> None:
    subject, baseline = (result(name, [1.0] * count) for name, count in zip(("mine", "base"), blocks, strict=True))
    found = conclude([subject, baseline], Target(threads=1), ["mine"], "", 0.1, [])
    told = " ".join(found.warnings)
    assert (f"only {min(blocks)} blocks to compare: the confidence interval is wide" in told) == wide
    assert ("14 blocks of mine and 2 of base, the ratio is of the 2 that took turns" in told) == uneven


def test_of_those_with_more_blocks_the_fastest_is_kept_in_any_order() -> None:
    disturbed = [1.0, 1.1, 1.0, 0.9, 1.0, *[1.5] * 10]
    slower = result("slower", disturbed)
    winner = result("winner", [(0.95 - 0.001 * (number % 2)) * each for number, each in enumerate(disturbed)])
    early = result("early", [1.2] * 5)  # before the machine got slower: the lowest median of all
    for results in ([slower, winner, early], [winner, slower, early], [early, slower, winner]):
        assert fastest(results, interleaved=True) is winner
