"""``quant``: static int8 by post-training quantization, written into the graph as quantize/dequantize operators."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from optc import Change, Numerics, OptcError, Pass, PassContext, PassOptions, PassResult, Program
from pydantic import Field

from optc_passes import observers
from optc_passes.quant_plan import RULE, make_plan
from optc_passes.quant_pt2e import calibrate, convert, prepare


class QuantOptions(PassOptions):
    """Options of ``quant``."""

    observer: Literal["minmax", "percentile", "entropy"] = Field(
        "minmax", description="how an activation's range is chosen from what calibration saw"
    )
    percentile: float = Field(
        99.99, gt=50, le=100, description="share of an activation's values kept by observer=percentile, in percent"
    )


class Quant(Pass):
    """Static int8: per-channel symmetric weights, per-tensor affine activations.

    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018,
    with ranges from calibration instead of training.
    """

    name = "quant"
    summary = "Quantize convolutions and linear layers, and what lies between them, to int8."
    numerics = Numerics(exact=False, min_sqnr_db=10.0)
    Options = QuantOptions
    options: QuantOptions

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize what can be.

        Raises:
            OptcError: there is no calibration data.
            DataError: a calibration batch cannot be used.
        """
        work = program.fork()
        plan = make_plan(work)
        if not plan.layers:
            return PassResult(program, modified=False, skipped=plan.skipped)
        if context.calibration is None:
            raise OptcError(
                "pass 'quant' has no calibration data to find activation ranges with", "give --data, or calibration=…"
            )
        prepared, _ = prepare(work, plan, self._observer())
        calibrate(prepared, context.calibration, context)
        applied = tuple(Change(RULE, layer.node.name, str(layer.weight.target)) for layer in plan.layers)
        return PassResult(convert(prepared, plan, program), True, applied, plan.skipped)

    def _observer(self) -> Any:
        if self.options.observer == "percentile":
            return partial_observer(observers.PercentileObserver, percentile=self.options.percentile)
        return {"minmax": observers.ActivationObserver, "entropy": observers.EntropyObserver}[self.options.observer]


def partial_observer(cls: Any, **kw): return cls.with_args(**kw)
