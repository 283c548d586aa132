"""``quant``: static int8 by post-training quantization, written into the graph as quantize/dequantize operators."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from optc import Change, Numerics, OptcError, Pass, PassContext, PassOptions, PassResult, Program, Skip
from optc_passes.observers import ActivationObserver, EntropyObserver, PercentileObserver
from optc_passes.quant_noise import Batch, layer_sqnr, output_sqnr
from optc_passes.quant_plan import RULE, make_plan
from optc_passes.quant_pt2e import calibrate, convert, prepare
from optc_passes.quant_split import split_composites
from optc_passes.torchao_pt2e import ObserverBase

_MIN_SQNR_DB = 10.0
"""Noise of a tenth of the signal's power: below it a network's outputs are no longer its own."""


class QuantOptions(PassOptions):
    """Options of ``quant``."""

    observer: Literal["minmax", "percentile", "entropy"] = Field(
        "minmax", description="how an activation's range is chosen from what calibration saw"
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="share of an activation's values, in percent, that observer=percentile keeps"
    )


@dataclass(frozen=True)
class _Attempt:
    """A quantized program, the layers that are int8 in it, and the SQNR of its outputs in dB."""

    program: Program
    layers: tuple[Change, ...]
    sqnr: float


class Quant(Pass):
    """Static int8: per-channel symmetric weights, per-tensor activations, ranges from calibration.

    Activations are affine uint8 for a CPU and symmetric int8 for a GPU, whose runtimes have no zero points.

    The arithmetic is that of Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018. Pools, views and residual additions between int8 layers stay in
    int8. Softmax, normalisations, GELU, SiLU, hard-swish and squeeze-and-excitation gates stay in float: onnxruntime
    has no int8 kernel for most, and where it has (sigmoid, mul) EfficientNet-B0 ran no faster for it.

    If the outputs of the quantized program miss the budget on calibration data, the layers that add most noise go back
    to float, as few as it takes.
    """

    name = "quant"
    summary = "Quantize convolutions, linear layers and what lies between them to int8."
    numerics = Numerics(exact=False, min_sqnr_db=_MIN_SQNR_DB)
    Options = QuantOptions
    options: QuantOptions

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize what can be; ``applied`` and ``skipped`` list every layer.

        Raises:
            OptcError: there is no calibration data, or the model itself gives NaN or Inf on it.
            DataError: a calibration batch cannot be used.
        """
        work = split_composites(program.fork())
        plan = make_plan(work)
        if not plan.layers:
            return PassResult(program, modified=False, skipped=plan.skipped)
        if context.calibration is None:
            raise OptcError("pass 'quant' needs calibration data to find ranges", "give --data, or calibration=…")
        symmetric = context.target.device == "cuda"
        prepared, observers = prepare(work, plan, self._observer(), symmetric)
        batches, references = calibrate(prepared, context.calibration, context)

        def attempt(in_float: Collection[str]) -> _Attempt:
            """Quantize all but these layers with the ranges already found."""
            work = split_composites(program.fork())
            plan = make_plan(work, in_float)
            prepared, _ = prepare(work, plan, self._observer(), symmetric, observers)
            layers = tuple(Change(RULE, layer.node.name, str(layer.weight.target)) for layer in plan.layers)
            quantized = convert(prepared, plan, program)
            return _Attempt(quantized, layers, output_sqnr(quantized, batches, references))

        best: _Attempt | None
        best = full = attempt(())
        given_back: tuple[Skip, ...] = ()
        if not full.sqnr >= _MIN_SQNR_DB:
            best, given_back = self._give_back(program, full, attempt, observers, batches[0], context)
        skipped = (*plan.skipped, *given_back)
        if best is None:
            return PassResult(program, modified=False, skipped=skipped)
        return PassResult(best.program, True, best.layers, skipped)

    def _give_back(
        self,
        program: Program,
        full: _Attempt,
        attempt: Callable[[Collection[str]], _Attempt],
        observers: dict[str, ObserverBase],
        batch: Batch,
        context: PassContext,
    ) -> tuple[_Attempt | None, tuple[Skip, ...]]:
        """The attempt with the fewest layers in float that meets the budget, by bisection over layers ranked by noise.

        ``None`` if only the float program meets it.

        Args:
            full: the attempt with every layer in int8, which does not meet it.
            batch: what each layer's own noise is measured on.
        """
        work = split_composites(program.fork())
        noise = layer_sqnr(work, make_plan(work), observers, batch)
        ranked = sorted(noise, key=lambda name: noise[name])
        too_few, enough, best = 0, len(ranked), None
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            context.progress(f"outputs at {full.sqnr:.1f} dB: trying {middle} of {len(ranked)} layers in float")
            tried = attempt(ranked[:middle])
            if tried.sqnr >= _MIN_SQNR_DB:
                enough, best = middle, tried
            else:
                too_few = middle
        skipped = tuple(
            Skip(
                RULE,
                name,
                f"given back to float: in int8 its own output has {noise[name]:.1f} dB SQNR, "
                f"and with every layer in int8 the model's has {full.sqnr:.1f} dB, below {_MIN_SQNR_DB:g} dB",
            )
            for name in ranked[:enough]
        )
        return best, skipped

    def _observer(self) -> Any:
        if self.options.observer == "percentile":
            return PercentileObserver.with_args(percentile=self.options.percentile)
        return {"minmax": ActivationObserver, "entropy": EntropyObserver}[self.options.observer]
