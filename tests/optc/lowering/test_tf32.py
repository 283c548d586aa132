from __future__ import annotations

import pytest
import torch

from optc.lowering.tf32 import without_tf32


def test_on_a_gpu_convolutions_are_float32_meanwhile() -> None:
    assert torch.backends.cudnn.allow_tf32
    with without_tf32(torch.device("cuda")):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError, match="out of memory"), without_tf32(torch.device("cuda")):
        raise RuntimeError("out of memory")
    assert torch.backends.cudnn.allow_tf32


def test_what_the_process_chose_for_products_comes_back() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with without_tf32(torch.device("cuda")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_on_the_cpu_nothing_is_set() -> None:
    with without_tf32(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32
