"""The unquantized candidates an optimized model has to beat: PyTorch eager and compiled, full and half precision."""

from __future__ import annotations

import copy
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from optc.bench.results import Candidate
from optc.errors import MeasurementError, one_line
from optc.evaluation import set_evaluation_mode
from optc.lowering.agreement import as_array
from optc.lowering.backend import Array, Runner
from optc.lowering.torch_memory import keep_freed_memory, return_freed_memory
from optc.machine import emulates_bf16, isa
from optc.target import Target

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def baselines(module: nn.Module, example_inputs: Sequence[Tensor], target: Target) -> list[Candidate]:
    """The baselines of a device: eager float32, eager half precision, and ``torch.compile`` of the latter.

    Half precision is bfloat16 on CPU, float16 on CUDA. A CPU without bfloat16 instructions emulates it (AVX2, AlexNet
    to ViT-Ti/16: 3 to 40 times float32's latency): there compiled float32 joins the list, and those of bfloat16 say
    why they are not measured.

    Args:
        module: the original model; put into eval mode and used as it is for float32 on CPU. Half-precision copies are
            made when a candidate is opened and dropped when the last that shares them is closed.
        example_inputs: one query's inputs, batch as it will be measured; compiled candidates specialise on its shapes.
    """
    device = torch.device(target.device)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    size = sum(t.nbytes for t in pytree.tree_leaves([list(module.parameters()), list(module.buffers())]))
    full_copies = 0 if all(t.device == device for t in module.parameters()) else size
    emulated = device.type == "cpu" and emulates_bf16(isa())
    halves = _Converted(module, half, device)
    fulls = _Converted(module, torch.float32, device)

    def candidate(kind: str, source: _Converted, copies: int) -> Candidate:
        open_ = _open_eager if kind == "eager" else _open_compiled
        name = f"{kind}-{_NAMES[source.dtype]}"
        opener = _refuse if emulated and source is halves else _opener(open_, source, tuple(example_inputs))
        return Candidate(name, _precision(source.dtype, device), False, opener, copies, specialised=kind == "compile")

    candidates = [
        candidate("eager", fulls, full_copies),
        candidate("eager", halves, size // 2),
        candidate("compile", halves, size // 2),
    ]
    if emulated:
        candidates.append(candidate("compile", fulls, size))
    return candidates


class _Converted:
    """One model in one precision on one device, made when first asked for and shared for as long as anyone holds it."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.module, self.dtype, self.device = module, dtype, device
        self._alive: Callable[[], nn.Module | None] = lambda: None

    def get(self) -> nn.Module:
        module = self._alive()
        if module is None:
            module = _convert(self.module, self.dtype, self.device)
            self._alive = weakref.ref(module)
        return module


def _convert(module: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module itself if it is as wanted, else a copy whose tensors are converted one by one, so that there is never
    a second copy in the old precision.
    """
    tensors = [*module.parameters(), *module.buffers()]
    set_evaluation_mode(module)
    if all(t.device == device and (t.dtype == dtype or not t.is_floating_point()) for t in tensors):
        return module
    memo: dict[int, Any] = {}
    for tensor in tensors:
        wanted = dtype if tensor.is_floating_point() else tensor.dtype
        converted = tensor.detach().to(device=device, dtype=wanted, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(converted, requires_grad=False) if is_parameter else converted
    return copy.deepcopy(module, memo)


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """What a model in ``dtype`` computes in. TF32 stays as the user has it: a baseline is the best that a user gets."""
    text = str(dtype).removeprefix("torch.")
    cudnn: Any = torch.backends.cudnn
    tf32 = device.type == "cuda" and dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32"
    return f"{text}, convolutions in TF32" if tf32 else text


class _TorchRunner(Runner):
    """Calls a PyTorch callable: float32 arrays in and out, the precision in between is the callable's."""

    def __init__(self, call: Callable[..., Any], provider: str, dtype: torch.dtype, device: torch.device) -> None:
        keep_freed_memory()  # as the backends that run PyTorch do
        self.provider, self.precision = provider, _precision(dtype, device)
        self._call: Callable[..., Any] | None = call
        self._dtype, self._device = dtype, device

    @torch.no_grad()
    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        if self._call is None:
            raise MeasurementError("the runner is closed")
        outputs = self._call(*[self._tensor(array) for array in inputs])
        return tuple(self._array(t) for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor))

    def _tensor(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

    def _array(self, tensor: Tensor) -> Array:
        array: Array = (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
        return array

    def close(self) -> None:
        self._call = None
        return_freed_memory()


def _opener(
    open_: Callable[[_Converted, tuple[Tensor, ...]], Runner], source: _Converted, example: tuple[Tensor, ...]
) -> Callable[[], Runner]:
    return lambda: open_(source, example)


def _refuse() -> Runner:
    raise MeasurementError("this CPU emulates bfloat16, several times slower")


def _open_eager(source: _Converted, example: tuple[Tensor, ...]) -> Runner:
    return _TorchRunner(source.get(), "torch eager", source.dtype, source.device)


def _open_compiled(source: _Converted, example: tuple[Tensor, ...]) -> Runner:
    """Compile and run once, so that compile time is spent here and failures show here.

    Freezing makes weights constants of the compiled code, packed for the kernels: the strongest form. It is set for the
    process while compiling, as Dynamo reads it there; among ``torch.compile``'s options it has no effect.
    """
    from torch._inductor import config

    start = time.perf_counter()
    try:
        with warnings.catch_warnings(), config.patch(freezing=True):
            warnings.simplefilter("ignore")
            compiled = torch.compile(source.get(), dynamic=False)
            runner = _TorchRunner(compiled, "torch.compile inductor", source.dtype, source.device)
            runner(*map(as_array, example))
    except Exception as error:
        hint = "install a C++ compiler such as g++" if "InvalidCxxCompiler" in str(error) else ""
        elapsed = time.perf_counter() - start
        raise MeasurementError(f"torch.compile failed after {elapsed:.0f} s: {one_line(error)}", hint) from error
    return runner
