"""Let torchvision and timm import beside a torch they were not built for.

torchvision's wheel on PyPI is built against CUDA torch. Beside CPU torch its extension does not load, and
``import torchvision`` dies with ``operator torchvision::nms does not exist`` while registering meta kernels for
operators nobody declared. Declaring their schemas first is enough: image models call none of them, and calling one
still fails with torch's own clear message.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import torch

_POOL = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SIZE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_DEFORM = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w,"
    " SymInt groups, SymInt offset_groups, bool use_mask"
)
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align(Tensor input, Tensor rois, {_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    f"qroi_align(Tensor input, Tensor rois, {_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    f"ps_roi_align(Tensor input, Tensor rois, {_POOL}, int sampling_ratio) -> (Tensor, Tensor)",
    f"roi_pool(Tensor input, Tensor rois, {_POOL}) -> (Tensor, Tensor)",
    f"ps_roi_pool(Tensor input, Tensor rois, {_POOL}) -> (Tensor, Tensor)",
    f"_roi_align_backward(Tensor grad, Tensor rois, {_POOL}, {_SIZE}, int sampling_ratio, bool aligned) -> Tensor",
    (
        f"_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_POOL}, int sampling_ratio,"
        f" {_SIZE}) -> Tensor"
    ),
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_POOL}, {_SIZE}) -> Tensor",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_POOL}, {_SIZE}) -> Tensor",
    f"deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_DEFORM}) -> Tensor",
    (
        "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias,"
        f" {_DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)


@cache
def declare_torchvision_ops() -> torch.library.Library | None:
    """Declare torchvision's operators if its own extension cannot; the returned library must stay alive (so cached)."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    extension = next(Path(spec.origin).parent.glob("_C*.so"), None)
    if extension is not None:
        try:
            torch.ops.load_library(str(extension))
            return None
        except OSError:
            pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        if not torch._C._dispatch_has_kernel(f"torchvision::{schema.partition('(')[0]}"):
            library.define(schema)
    return library
