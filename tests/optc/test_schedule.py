"""GPipe's forward schedule on paper."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optc.schedule import schedule

SECONDS = st.floats(0.01, 10)
CASES = st.integers(1, 5).flatmap(
    lambda stages: st.tuples(
        st.lists(SECONDS, min_size=stages, max_size=stages),
        st.lists(SECONDS, min_size=stages - 1, max_size=stages - 1),
        st.integers(1, 12),
    )
)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (1, 5), (4, 1), (3, 8), (8, 3)])
def test_equal_stages_have_the_bubble_of_the_paper(stages: int, microbatches: int) -> None:
    plan = schedule([2.0] * stages, [0.0] * (stages - 1), microbatches)
    assert plan.seconds == pytest.approx(2.0 * (microbatches + stages - 1))
    assert plan.bubble == pytest.approx(plan.ideal_bubble)
    assert plan.ideal_bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
    assert plan.period == 2.0


def test_the_slowest_stage_with_its_transfers_sets_the_pace() -> None:
    compute, transfer = [1.0, 3.0, 2.0], [0.5, 0.25]
    plan = schedule(compute, transfer, 100)
    assert plan.period == 0.5 + 3.0 + 0.25
    ends = [slot.end for slot in plan.slots[-1]]
    gaps = [two - one for one, two in itertools.pairwise(ends)]
    assert gaps[10:] == pytest.approx([plan.period] * len(gaps[10:]))
    assert schedule(compute, transfer, 1).seconds == pytest.approx(sum(compute) + sum(transfer))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(CASES)
def test_no_stage_does_two_things_at_once_nor_anything_before_it_can(
    case: tuple[list[float], list[float], int],
) -> None:
    compute, transfer, microbatches = case
    plan = schedule(compute, transfer, microbatches)
    for stage, slots in enumerate(plan.slots):
        assert [slot.microbatch for slot in slots] == list(range(microbatches))
        for slot in slots:
            assert slot.receive <= slot.compute <= slot.computed <= slot.send <= slot.end
            assert slot.computed - slot.compute == pytest.approx(compute[stage])
        for one, two in itertools.pairwise(slots):
            assert one.end <= two.receive
    for sender, receiver in itertools.pairwise(plan.slots):
        for sent, received in zip(sender, receiver, strict=True):
            assert (sent.send, sent.end) == (received.receive, received.compute)
            assert sent.end - sent.send == pytest.approx(transfer[sent.stage])
    busy = sum(slot.computed - slot.compute for slots in plan.slots for slot in slots)
    assert plan.bubble == pytest.approx(1 - busy / (len(compute) * plan.seconds), abs=1e-9)
    assert plan.seconds >= microbatches * plan.period - 1e-9
