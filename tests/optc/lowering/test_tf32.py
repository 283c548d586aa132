from __future__ import annotations

import pytest
import torch

from optc.lowering.tf32 import without_tf32


def test_on_a_gpu_convolutions_are_float32_meanwhile() -> None:
    assert torch.backends.cudnn.allow_tf32
    with without_tf32(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError, match="out of memory"), without_tf32(torch.device("cuda")):
        raise RuntimeError("out of memory")
    assert torch.backends.cudnn.allow_tf32


def test_on_the_cpu_nothing_is_set() -> None:
    with without_tf32(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32
