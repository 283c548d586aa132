"""The ``openvino`` backend: the graph as OpenVINO IR, run by OpenVINO's CPU plugin."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from optc import Backend, BackendError, KernelTime, Lowered, Runner, Target
from optc_openvino.attention import spell_out_attention, split_projections
from optc_openvino.bfloat16 import take_and_give_float32, use_inference_precision
from optc_openvino.choice import Preferred, choose_kernels, recall_kernels, write_choice
from optc_openvino.execution import not_int8
from optc_openvino.flatten import flatten_layers
from optc_openvino.graph import (
    drop_repeated_quantizations,
    drop_zero_points,
    quantized_layers,
    use_hsigmoid,
    use_signed_activations,
)
from optc_openvino.partitioner import faster_partitioner
from optc_openvino.runner import LEAVE_OUT_STREAMS, OpenVinoRunner, refuse_dependent_samples
from optc_openvino.runtime import VERSION, OpenVinoOptions, errors, ov, read
from optc_openvino.times import kernel_times

if TYPE_CHECKING:
    from optc import Program

FILES = ("model.xml", "model.bin")
FILE_OF_KERNELS = "kernels.xml"
"""The model with kernels chosen by measuring."""
RUN_SCRIPT = Path(__file__).with_name("run_openvino.py")


class OpenVinoBackend(Backend):
    """Lowers to OpenVINO's own IR, through ONNX with explicit QuantizeLinear/DequantizeLinear."""

    name = "openvino"
    summary = "OpenVINO on CPU: an IR file (.xml and .bin)."
    Options = OpenVinoOptions

    @classmethod
    def unavailable(cls, target: Target) -> str | None:
        """Why OpenVINO is not used on the target's device."""
        if target.device == "cpu":
            return None
        return f"the openvino backend runs on the CPU only, not on '{target.device}': use --device cpu"

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        """Write ``model.xml`` and ``model.bin``, and compare what they compute with the graph, less needless roundings.

        Raises:
            BackendError: an operator has no ONNX form, OpenVINO refuses it, OpenVINO's outputs on the example inputs
                differ from the graph's, or a batch is to be divided that the model fixes or whose samples depend on
                one another.
        """
        from optc import check_agreement, export_onnx  # they import torch, which loading a model does not need
        from optc_openvino.roundings import without_roundings_before_activations

        program, not_rounded = without_roundings_before_activations(program)
        with tempfile.TemporaryDirectory(prefix="onnx-", dir=folder) as scratch:
            onnx = Path(scratch) / "model.onnx"
            _, exported = export_onnx(program, onnx)
            model = read(onnx)
            with errors("openvino cannot rewrite the model"):
                model = take_and_give_float32(model)
                dropped = drop_zero_points(model)
                own = use_inference_precision(model)  # the casts that it drops would hide the patterns below
                drop_repeated_quantizations(model)
                use_signed_activations(model)
                use_hsigmoid(model)
                flatten_layers(model)
                spell_out_attention(model)
                split_projections(model)
            with errors("openvino cannot write the model"):
                ov.save_model(model, folder / FILES[0], compress_to_fp16=False)
            del model  # it maps the ONNX file
        given = self.options(target)
        model = read(folder / FILES[0])
        operators = Counter(node.get_type_name() for node in model.get_ops())
        details = {
            "openvino": VERSION,
            "opset": exported["opset"],
            "weight_bytes": exported["weight_bytes"],
            "decomposed": exported["decomposed"],
            "origins": exported["origins"],
            "operators": dict(operators.most_common()),
            "dropped_zero_points": dropped,
            "dropped_quantizations": not_rounded,
            "inference_precision": "bfloat16" if own else "as in the graph",
        }

        batch = target.batch if program.dynamic_batch else program.example_inputs[0].shape[:1].numel()

        def checked(model: ov.Model) -> tuple[dict[str, Any], str, str]:
            """Details, and what the runner tells of itself if it is the one that the target asks for."""
            with closing(OpenVinoRunner(model, replace(target, batch=batch), given)) as runner:
                found = {
                    "divisible": runner.divisible,
                    "not_int8": not_int8(runner.kernels, quantized_layers(model)),
                    "check": check_agreement("openvino", program, runner, target.batch).details(),
                }
                return (found, runner.provider, runner.precision) if batch == target.batch else (found, "", "")

        found, provider, precision = checked(model)
        details |= found
        if given.streams > 1 and details["divisible"]:
            refuse_dependent_samples(model, target, given)
        elif given.streams > 1:
            if batch == target.batch:
                raise BackendError("an input or output has a batch that cannot be divided", LEAVE_OUT_STREAMS)
            given = given.model_copy(update={"streams": 1})  # a layer by itself, whose rows are parts of images
        lowered = Lowered(
            FILES, details, run_script=_run_script(given, FILES[0]), provider=provider, precision=precision
        )
        chosen: Mapping[str, Preferred] | None = {}
        if given.kernels == "measured":
            chosen = recall_kernels(folder / FILES[0], target)
            if chosen is None:
                chosen = choose_kernels(folder / FILES[0], target, given)
        if not chosen:
            return lowered
        (made,) = _with_kernels(lowered, chosen, [given], folder)
        again, provider, precision = checked(read(folder / FILE_OF_KERNELS, folder / FILES[1]))
        return replace(made, details={**made.details, **again}, provider=provider, precision=precision)

    @classmethod
    def measures_to_lower(cls, target: Target) -> bool:
        """Where the kernels are to be the fastest ones."""
        return bool(cls.options(target).kernels == "measured")

    def variants(self, lowered: Lowered, target: Target, folder: Path) -> list[tuple[dict[str, Any], Lowered]]:
        """A stream for each thread, or as many as divide the batch as well; each with the partitioner and with the
        kernels that were measured to be faster.

        What was asked for stays. Layers that one thread computes for a part of the batch wait for no other thread, and
        operators that OpenVINO does not divide among threads run side by side. But each stream reads all weights.
        Kernels are measured once, for the divided batch if it can be.
        """
        given = self.options(target)
        asked, one_query = given.model_fields_set, given.hint == "latency"
        streams = math.gcd(target.batch, target.threads)
        divide = one_query and streams > 1 and "streams" not in asked and lowered.details["divisible"]
        ways: list[dict[str, Any]] = [{}, {"streams": streams}] if divide else [{}]
        if one_query and "partitioner" not in asked:
            model = _read(folder, lowered.files)
            for way in ways:
                if other := faster_partitioner(model, target, given.model_copy(update=way)):
                    way["partitioner"] = other
        options = [given.model_copy(update=way) for way in ways]
        found = [
            (way, replace(lowered, run_script=_run_script(each, lowered.files[0])))
            for way, each in zip(ways, options, strict=True)
            if way
        ]
        if chosen := choose_kernels(folder / FILES[0], target, options[-1]) if "kernels" not in asked else {}:
            written = _with_kernels(lowered, chosen, options, folder)
            found += [({**way, "kernels": "measured"}, made) for way, made in zip(ways, written, strict=True)]
        return found

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        """Read the IR and compile it for the target's threads and batch.

        Raises:
            BackendError: the device is not the CPU, or OpenVINO refuses the files.
        """
        reason = self.unavailable(target)
        if reason:
            raise BackendError(reason)
        return OpenVinoRunner(_read(folder, files), target, self.options(target))

    def profile(
        self, folder: Path, files: tuple[str, ...], target: Target, inputs: Sequence[NDArray[Any]]
    ) -> list[KernelTime]:
        """How long each node of the execution graph takes, by OpenVINO's performance counters.

        Raises:
            BackendError: OpenVINO refuses the files, or cannot run them on these inputs.
        """
        return kernel_times(_read(folder, files), target, self.options(target), inputs)


def _read(folder: Path, files: Sequence[str]) -> ov.Model:
    """Read an IR; its weights are the second file."""
    return read(*(folder / name for name in files[:2]))


def _with_kernels(
    lowered: Lowered, chosen: Mapping[str, Preferred], given: Sequence[OpenVinoOptions], folder: Path
) -> list[Lowered]:
    """The same with these kernels, in a second file beside the same weights: for each of ``given`` its run script."""
    write_choice(folder / FILES[0], chosen, folder / FILE_OF_KERNELS)
    details = {**lowered.details, "kernels": {name: list(preferred) for name, preferred in chosen.items()}}
    files = (FILE_OF_KERNELS, FILES[1])
    return [Lowered(files, details, run_script=_run_script(options, FILE_OF_KERNELS)) for options in given]


def _run_script(given: OpenVinoOptions, file: str) -> str:
    """``run.py``, compiling that file with the same hint, streams and partitioner."""
    text = RUN_SCRIPT.read_text(encoding="utf-8")
    text = text.replace('MODEL = "model.xml"', f'MODEL = "{file}"', 1)
    text = text.replace('HINT = "LATENCY"', f'HINT = "{given.hint.upper()}"', 1)
    text = text.replace("STREAMS = 1", f"STREAMS = {given.streams}", 1)
    return text.replace('PARTITIONER = "DEFAULT"', f'PARTITIONER = "{given.partitioner.upper()}"', 1)
