"""What a target may be."""

from __future__ import annotations

import pytest

import optc


@pytest.mark.parametrize("given", [{"batch": 0}, {"threads": 0}, {"threads": -1}])
def test_a_target_without_images_or_threads_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(optc.OptcError, match="is none — give 1 or more"):
        optc.Target(**given)
