"""Parts of a batch that run side by side."""

from __future__ import annotations

import pytest

from optc import BackendError
from optc_openvino.parts import run_side_by_side


class Request:
    """Stands for an inference request, of which OpenVINO has none that fails while others run."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.waits = fails, 0

    def start_async(self) -> None:
        pass

    def wait(self) -> None:
        self.waits += 1
        if self.fails:
            raise RuntimeError("out of memory")


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_that_fails_leaves_none_running(failing: int) -> None:
    requests = tuple(Request(number == failing) for number in range(3))
    with pytest.raises(BackendError, match="out of memory"):
        run_side_by_side(requests)  # type: ignore[arg-type]
    assert [request.waits for request in requests] == [1, 1, 1]
