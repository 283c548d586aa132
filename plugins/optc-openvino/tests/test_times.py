"""Times of the nodes of OpenVINO's execution graph."""

from __future__ import annotations

from pathlib import Path
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
    images, run_by, own = np.zeros((16, 32, 40, 40), np.float32), [], times_module.set_parts

    def noted(requests: Any, arrays: Any) -> None:
        run_by.append(requests)
        own(requests, arrays)

    monkeypatch.setattr(times_module, "set_parts", noted)
    found = [
        kernel_times(read(tmp_path / "model.xml"), target, OpenVinoOptions(streams=streams), [images])
        for streams in (1, 2, 3)
    ]
    assert [len(requests) for requests in run_by] == [1, 2, 1], "3 do not divide 16"
    layers = [[each for each in times if "Convolution" in each.operator] for times in found]
    names = [[each.name for each in one] for one in layers]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 2
    for times, requests in zip(layers, run_by, strict=True):
        # Each part has counters of its own, and all run at the same time.
        own_counters = [
            {each.node_name: each.real_time.total_seconds() for each in request.get_profiling_info()}
            for request in requests
        ]
        for time in times:
            assert time.seconds == pytest.approx(sum(each[time.name] for each in own_counters) / len(requests))
            assert time.seconds > 0
