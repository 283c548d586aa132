"""Times of the nodes of OpenVINO's execution graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import optc
from optc_openvino import times as times_module
from optc_openvino.backend import OpenVinoBackend
from optc_openvino.runtime import OpenVinoOptions, read
from optc_openvino.times import kernel_times


def test_parts_of_a_divided_batch_are_timed_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    program = optc.capture(module, (torch.randn(2, 32, 40, 40),))
    target = optc.Target(threads=2, batch=16)
    OpenVinoBackend().lower(program, target, tmp_path)
    images, parts, own = np.zeros((16, 32, 40, 40), np.float32), [], times_module.compile_parts

    def compiled(*args: Any) -> Any:
        made = own(*args)
        parts.append(made[1])
        return made

    monkeypatch.setattr(times_module, "compile_parts", compiled)
    found = {
        streams: [
            kernel_times(read(tmp_path / "model.xml"), target, OpenVinoOptions(streams=streams), [images])
            for _ in range(3)
        ]
        for streams in (1, 2, 3)
    }
    assert parts == [1, 1, 1, 2, 2, 2, 1, 1, 1]
    layers = [[each.name for each in times[0] if "Convolution" in each.operator] for times in found.values()]
    assert layers[0] == layers[1] == layers[2]
    assert len(layers[0]) == 2
    # Each part is half of the images on one thread: not half and not twice as long, whatever else the machine does.
    half = replace(target, threads=1, batch=8)
    alone = [kernel_times(read(tmp_path / "model.xml"), half, OpenVinoOptions(), [images[:8]]) for _ in range(3)]
    divided, whole = (median(sum(each.seconds for each in one) for one in times) for times in (found[2], alone))
    assert 0.6 < divided / whole < 1.6
