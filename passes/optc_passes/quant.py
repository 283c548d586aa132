"""``quant``: layers in int8, or weights in 8- or 4-bit blocks, by post-training quantization written into the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from optc import Numerics, OptcError, Pass, PassContext, PassOptions, PassResult, Program, Skip
from optc_passes.observers import ActivationObserver, EntropyObserver, MseObserver, PercentileObserver
from optc_passes.quant_account import Entry, account, entries, noisiest
from optc_passes.quant_auto import (
    CHOSEN,
    Choice,
    choose,
    in_words,
    measure_layers,
    possible_formats,
    whole_seconds,
    worth_having,
)
from optc_passes.quant_budget import MIN_SQNR_DB, over_budget
from optc_passes.quant_formats import FLOAT, INT8, Attempt, Formats, LayerFormats
from optc_passes.quant_local import WEIGHTS_ALONE
from optc_passes.quantizer import SATURATES, Int8Kernels


class QuantOptions(PassOptions):
    """Options of ``quant``."""

    formats: Literal["int8", "int8-dynamic", "int8-weights", "int4-weights", "auto"] = Field(
        "int8",
        description="int8: weights and activations; int8-dynamic: linear layers, ranges found at run time;"
        " int8-weights, int4-weights: weights of linear layers, in blocks that share a scale; auto: for each layer that"
        " of these, bf16 and fp16 which makes the model fastest within its budget",
    )
    block: Annotated[Literal[32, 64, 128, 256], BeforeValidator(int)] | None = Field(
        None,
        description="weights that share a scale in formats with blocks; if not given 128, and 256 with auto, as fewer"
        " scales are read in less time and the budget is held anyway",
    )
    observer: Literal["minmax", "percentile", "entropy", "mse"] = Field(
        "minmax",
        description="how an activation's range is chosen from what calibration saw; mse: for each tensor, of these and"
        " of 91 clippings the one of least squared error",
    )
    percentile: float = Field(
        99.99,
        gt=50,
        le=100,
        allow_inf_nan=False,
        description="share of an activation's values, in percent, that observer=percentile keeps",
    )


class Quant(Pass):
    """Static int8: per-channel symmetric weights, per-tensor activations, ranges from calibration.

    Activations are affine uint8 for a CPU and symmetric int8 for a GPU, whose runtimes have no zero points.

    The arithmetic is that of Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018. Pools, views and residual additions between int8 layers stay in
    int8, and on a CPU attention multiplies queries by keys in int8. Softmax, normalisations, GELU, SiLU, hard-swish and
    squeeze-and-excitation gates stay in float: onnxruntime has no int8 kernel for most, and where it has (sigmoid, mul)
    EfficientNet-B0 ran no faster for it.

    Other formats round the weights of linear layers alone, in blocks (:mod:`optc_passes.quant_blocks`), or choose for
    each layer by measuring (:mod:`optc_passes.quant_auto`).

    Biases of int8 layers are corrected if that brings the outputs closer, those of layers with weights in blocks
    wherever there is calibration data. If the outputs miss the SQNR budget on that, or cost more of the task's metric
    than the context allows, attention goes back to float, and then the layers that add most noise, as few as it takes.
    """

    name = "quant"
    summary = "Quantize convolutions, linear layers and what lies between them to int8."
    numerics = Numerics(exact=False, min_sqnr_db=MIN_SQNR_DB)
    Options = QuantOptions
    options: QuantOptions

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize what can be; ``applied`` and ``skipped`` list every layer.

        Raises:
            OptcError: there is no calibration data, or the model itself gives NaN or Inf on it.
            DataError: a calibration batch cannot be used.
        """
        layers = LayerFormats(
            program, context, self._observer(context), self.options.block or _block(self.options.formats)
        )
        if not layers.plan.layers:
            return PassResult(program, modified=False, skipped=layers.skipped(None))
        if context.calibration is None and self.options.formats not in WEIGHTS_ALONE:
            raise OptcError(
                "pass 'quant' needs calibration data to find ranges",
                "give calibration=… in Python; for a model that takes no images -O quant.formats=int8-weights, or fuse",
            )
        if layers.kernels.saturates and self.options.formats not in WEIGHTS_ALONE:
            context.note(SATURATES)
        layers.calibrate(context)
        if self.options.formats == "auto":
            return self._auto(program, layers, context)
        form = self.options.formats
        refused = {name: layers.refusal(name, form) for name in layers.names}
        formats = {name: form for name, reason in refused.items() if reason is None}
        skipped = [Skip(form, name, reason) for name, reason in refused.items() if reason]
        if not formats:
            return PassResult(program, modified=False, skipped=(*layers.skipped(None), *skipped))
        asked = dict.fromkeys(formats, (form,))
        layers.noise(asked, with_outputs=context.budget is not None)
        best: Attempt | None
        best = layers.attempt(formats)
        if form == INT8:
            best = layers.with_better_bias(formats, best)
        problem = over_budget(best, context)
        if problem and form == INT8 and layers.give_back_attention():
            best = layers.attempt(formats)
            problem = over_budget(best, context)
        if problem and not layers.output_noise:
            layers.noise(asked, with_outputs=True)
        noise = layers.own_noise
        doubtful = noisiest(layers, noise, context) if problem else {}
        table = entries(layers, asked, noise, doubtful)
        if problem:
            best, given_back = self._give_back(layers, formats, table, problem, context)
            skipped += given_back
        skipped = [*layers.skipped(best), *skipped]
        why = {skip.node: skip.reason for skip in skipped}
        kept = {change.node: form for change in best.layers} if best else {}
        rows = account(table, kept, why | dict.fromkeys(kept, "as asked, within the budget"))
        if best is None:
            return PassResult(program, modified=False, skipped=tuple(skipped), account=rows)
        return PassResult(best.program, True, best.layers, tuple(skipped), rows)

    def _auto(self, program: Program, layers: LayerFormats, context: PassContext) -> PassResult:
        """Each layer in the format that the table and the budget choose, on the backend where that is fastest."""
        if not context.latency:
            raise OptcError(
                "quant.formats=auto needs a backend to measure layers on, one that does not compile for seconds",
                "use optc optimize with --backend auto or onnxruntime",
            )
        forms = possible_formats(layers, context)
        asked = {name: tuple(form for form in each if form != FLOAT) for name, each in forms.items()}
        layers.noise(asked, with_outputs=True)
        int8 = {name: INT8 for name, each in forms.items() if INT8 in each}
        whole = layers.with_better_bias(int8, layers.attempt(int8))
        noise = layers.own_noise
        measured = measure_layers(layers, forms, context)
        wholes = noisiest(layers, worth_having(noise, measured), context)
        best: Choice | None = None
        for backend, seconds in measured.items():
            layers.attention = layers.kernels.attention
            choice = choose(layers, entries(layers, forms, noise, wholes, backend, seconds), context)
            if best is None or choice.seconds < best.seconds:
                best = choice
        if best is None:
            skips = tuple(Skip("auto", name, "no backend runs it by itself") for name in layers.names)
            return PassResult(program, modified=False, skipped=(*layers.skipped(None), *skips))
        rows = account(best.table, best.formats, {name: best.why(name) for name in layers.names})
        floats = [name for name, form in best.formats.items() if form == FLOAT]
        skipped = (*layers.skipped(best.attempt), *(Skip("auto", name, best.why(name)) for name in floats))
        backend = best.table[0].backend
        models = {FLOAT: program}
        if best.attempt.layers:
            models[CHOSEN] = best.attempt.program
        layers.attention = layers.kernels.attention
        plain, given_back = self._within_budget(layers, int8, whole, best.table, context) if int8 else (None, [])
        if plain is not None:
            models[INT8] = plain.program
        taken = whole_seconds(models, backend, context)
        quickest = min((name for name in taken if taken[name] >= 0), key=taken.__getitem__, default=FLOAT)
        # Not where the backend could not run the mix: lowering says why.
        if not best.attempt.layers or taken[CHOSEN] > taken[quickest]:
            kept = plain if quickest == INT8 else None
            formats = {change.node: INT8 for change in kept.layers} if kept else {}
            why = dict.fromkeys(layers.names, in_words(taken, backend))
            why |= {skip.node: skip.reason for skip in given_back if kept}
            floats = [name for name in layers.names if name not in formats]
            skipped = (*layers.skipped(kept), *(Skip("auto", name, why[name]) for name in floats))
            rows = account(best.table, formats, why)
            if kept is None:
                return PassResult(program, modified=False, skipped=skipped, account=rows)
            return PassResult(kept.program, True, kept.layers, skipped, rows)
        return PassResult(best.attempt.program, True, best.attempt.layers, skipped, rows)

    def _within_budget(
        self, layers: LayerFormats, formats: Formats, whole: Attempt, table: Sequence[Entry], context: PassContext
    ) -> tuple[Attempt | None, list[Skip]]:
        """As many layers in the formats given as the budget allows (``None`` if none), and why not the others.

        Args:
            whole: the attempt with all of them.
        """
        problem = over_budget(whole, context)
        if problem and layers.give_back_attention():
            whole = layers.attempt(formats)
            problem = over_budget(whole, context)
        return self._give_back(layers, formats, table, problem, context) if problem else (whole, [])

    def _give_back(
        self,
        layers: LayerFormats,
        formats: Formats,
        table: Sequence[Entry],
        problem: str,
        context: PassContext,
    ) -> tuple[Attempt | None, list[Skip]]:
        """The attempt with the fewest layers in float that meets the budget, by bisection over layers ranked by harm.

        ``None`` if only the float program meets it.

        Args:
            problem: what is wrong with every layer in its format.
        """
        quantized = {entry.layer: entry for entry in table if entry.form == formats.get(entry.layer)}
        ranked = sorted(quantized, key=lambda name: _harm(quantized[name]))
        too_few, enough, best = 0, len(ranked), None
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            context.progress(f"with all layers quantized {problem}: trying {middle} of {len(ranked)} in float")
            tried = layers.attempt({name: formats[name] for name in ranked[middle:]})
            if over_budget(tried, context):
                too_few = middle
            else:
                enough, best = middle, tried
        return best, [
            Skip(
                formats[name],
                name,
                f"given back to float: in {formats[name]} {quantized[name].noise_in_words}, "
                f"and with every layer in it {problem}",
            )
            for name in ranked[:enough]
        ]

    def _observer(self, context: PassContext) -> Any:
        centre = Int8Kernels.of(context).centre
        if self.options.observer == "percentile":
            return PercentileObserver.with_args(percentile=self.options.percentile, centre=centre)
        kinds = {"minmax": ActivationObserver, "entropy": EntropyObserver, "mse": MseObserver}
        return kinds[self.options.observer].with_args(centre=centre)


def _block(formats: str) -> int:
    """Weights that share a scale where the user does not say."""
    return 256 if formats == "auto" else 128


def _harm(entry: Entry) -> tuple[float, ...]:
    """Sorts the most harmful first: by what they do to the metric and to the outputs, the unknown last by own noise."""
    if entry.model_sqnr_db is None:
        return 1, entry.sqnr_db
    return 0, -max(entry.drop or 0.0, 0.0), entry.model_sqnr_db
