"""optc: what LLVM's opt is to programs, for neural networks.

Names are imported on first use, so ``import optc`` (and ``optc --help``) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optc.api import Optimized as Optimized
    from optc.api import optimize as optimize
    from optc.bench.cache import cache_file as cache_file
    from optc.bench.cache import cache_folder as cache_folder
    from optc.bench.cache import write_cache as write_cache
    from optc.budget import Budget as Budget
    from optc.budget import Metric as Metric
    from optc.data.dataset import Dataset as Dataset
    from optc.data.dataset import Split as Split
    from optc.errors import BackendError as BackendError
    from optc.errors import DataError as DataError
    from optc.errors import OptcError as OptcError
    from optc.frontend.capture import capture as capture
    from optc.frontend.source import BuiltModel as BuiltModel
    from optc.frontend.source import ModelSource as ModelSource
    from optc.frontend.source import PretrainedUnavailable as PretrainedUnavailable
    from optc.lowering.agreement import Agreement as Agreement
    from optc.lowering.agreement import check_agreement as check_agreement
    from optc.lowering.artifact import load as load
    from optc.lowering.backend import Backend as Backend
    from optc.lowering.backend import BackendOptions as BackendOptions
    from optc.lowering.backend import Lowered as Lowered
    from optc.lowering.backend import Runner as Runner
    from optc.lowering.kernel_times import KernelTime as KernelTime
    from optc.lowering.kernel_times import repeat_query as repeat_query
    from optc.lowering.layer_precision import layer_precision as layer_precision
    from optc.lowering.onnx_export import export_onnx as export_onnx
    from optc.lowering.tensorrt_onnx import export_tensorrt_onnx as export_tensorrt_onnx
    from optc.passmanager.compare import Comparison as Comparison
    from optc.passmanager.compare import compare as compare
    from optc.passmanager.contract import Calibration as Calibration
    from optc.passmanager.contract import Change as Change
    from optc.passmanager.contract import Instrument as Instrument
    from optc.passmanager.contract import Numerics as Numerics
    from optc.passmanager.contract import Pass as Pass
    from optc.passmanager.contract import PassContext as PassContext
    from optc.passmanager.contract import PassOptions as PassOptions
    from optc.passmanager.contract import PassResult as PassResult
    from optc.passmanager.contract import Skip as Skip
    from optc.passmanager.manager import PassManager as PassManager
    from optc.plugins.hookspecs import Entry as Entry
    from optc.plugins.hookspecs import hookimpl as hookimpl
    from optc.program import ModelInfo as ModelInfo
    from optc.program import Preprocessing as Preprocessing
    from optc.program import Program as Program
    from optc.target import Target as Target

__version__ = "0.1.0"

_HOMES = {
    "optc.api": ("Optimized", "optimize"),
    "optc.bench.cache": ("cache_file", "cache_folder", "write_cache"),
    "optc.lowering.artifact": ("load",),
    "optc.budget": ("Budget", "Metric"),
    "optc.data.dataset": ("Dataset", "Split"),
    "optc.frontend.capture": ("capture",),
    "optc.frontend.source": ("BuiltModel", "ModelSource", "PretrainedUnavailable"),
    "optc.errors": ("BackendError", "DataError", "OptcError"),
    "optc.lowering.agreement": ("Agreement", "check_agreement"),
    "optc.lowering.backend": ("Backend", "BackendOptions", "Lowered", "Runner"),
    "optc.lowering.kernel_times": ("KernelTime", "repeat_query"),
    "optc.lowering.layer_precision": ("layer_precision",),
    "optc.lowering.onnx_export": ("export_onnx",),
    "optc.lowering.tensorrt_onnx": ("export_tensorrt_onnx",),
    "optc.passmanager.compare": ("Comparison", "compare"),
    "optc.passmanager.contract": (
        "Calibration",
        "Change",
        "Instrument",
        "Numerics",
        "Pass",
        "PassContext",
        "PassOptions",
        "PassResult",
        "Skip",
    ),
    "optc.passmanager.manager": ("PassManager",),
    "optc.plugins.hookspecs": ("Entry", "hookimpl"),
    "optc.program": ("ModelInfo", "Preprocessing", "Program"),
    "optc.target": ("Target",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'optc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
