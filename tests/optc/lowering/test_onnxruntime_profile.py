from __future__ import annotations

import pytest

from optc.errors import BackendError
from optc.lowering.onnxruntime_profile import (
    Kernel,
    fallback,
    inserted_casts,
    kernels,
    precision,
    provider_counts,
    refuse_fallback,
)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
Typed = tuple[str, list[int]]


def event(operator: str, *inputs: Typed, node: str = "", parameters: int = 0, index: int = 0) -> dict[str, object]:
    args = {
        "op_name": operator,
        "provider": CPU,
        "node_index": str(index),
        "input_type_shape": [{kind: shape} for kind, shape in inputs],
        "output_type_shape": [{"float": [1, 8]}],
        "parameter_size": str(parameters),
    }
    return {"cat": "Node", "name": f"{node or operator}_kernel_time", "args": args}


def numbered(*events: dict[str, object]) -> list[dict[str, object]]:
    for index, each in enumerate(events):
        each["args"]["node_index"] = str(index)  # type: ignore[index]
    return list(events)


X, W, U8 = ("float", [1, 8]), ("float", [8, 8]), ("uint8", [1, 8])


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([event("Conv", X, W), event("FusedGemm", X)], "float32"),
        ([event("QLinearConv", U8), event("MatMulIntegerToFloat", U8), event("Conv", X)],
         "int8 (2 of 3 layers, 1 float32)"),
        ([event("QGemm", U8), event("MatMulNBits", X)], "int4 (1 of 2 layers, 1 int8)"),
        ([event("Gemm", X), event("MatMul", U8, U8)], "float32"),  # attention's product of two activations
        ([event("MatMul", X, W, parameters=256)], "float32"),
        ([event("Relu", X)], "float32"),
        ([], "no arithmetic"),
    ],
)  # fmt: skip
def test_precision_counts_layers_by_the_kernel_that_ran(events: list[dict[str, object]], expected: str) -> None:
    assert precision(kernels(numbered(*events))) == expected


def test_a_node_that_ran_twice_is_one_kernel_and_other_events_are_none() -> None:
    before = {"cat": "Node", "name": "a_fence_before", "args": {"op_name": "Conv"}}
    session = {"cat": "Session", "name": "model_run", "dur": 1}
    ran = kernels([session, before, event("Conv", X, node="a"), event("Conv", X, node="a"), event("Relu", node="b")])
    assert [kernel.node for kernel in ran] == ["a", "b"]
    assert ran[0].inputs == (("float", (1, 8)),)


def on(provider: str, operator: str, inputs: list[tuple[str, tuple[int, ...]]], output: tuple[str, tuple[int, ...]]):  # type: ignore[no-untyped-def]
    return Kernel(f"node_{operator}", operator, provider, tuple(inputs), (output,))


IMAGE, SHAPE, SCALAR = ("float", (1, 3, 8, 8)), ("int64", (4,)), ("int64", ())
REAL_WORK = [
    on(CPU, "Conv", [IMAGE], IMAGE),
    on(CPU, "ArgMax", [("float", (4, 10))], ("int64", (4,))),  # what the user asked for, though it is small integers
    on(CPU, "Gather", [("int64", (50, 8)), SHAPE], ("int64", (4, 8))),
    on(CPU, "Cast", [("int64", (4, 8))], ("float", (4, 8))),
]
BOOKKEEPING = [
    on(CPU, "Shape", [IMAGE], SHAPE),
    on(CPU, "Gather", [SHAPE, SCALAR], SCALAR),
    on(CPU, "Concat", [("int64", (1,)), ("int64", (1,))], ("int64", (2,))),
    on(CUDA, "MemcpyFromHost", [IMAGE], IMAGE),
    on(CPU, "MemcpyToHost", [IMAGE], IMAGE),
]


def test_copies_and_shapes_on_the_cpu_are_no_fallback_and_work_is() -> None:
    ran = [*BOOKKEEPING, *REAL_WORK, on(CUDA, "Gemm", [("float", (1, 8))], ("float", (1, 8)))]
    assert [each["operator"] for each in fallback(ran, CUDA)] == ["Conv", "ArgMax", "Gather", "Cast"]
    assert fallback(ran, CUDA)[0] == {"node": "node_Conv", "operator": "Conv", "provider": CPU}
    assert provider_counts(ran) == {CPU: 8, CUDA: 2}
    assert fallback([*BOOKKEEPING, ran[-1]], CUDA) == []


def test_the_refusal_names_eight_nodes_and_counts_the_rest() -> None:
    ran = [Kernel(f"conv{index}", "Conv", CPU) for index in range(11)]
    with pytest.raises(BackendError) as caught:
        refuse_fallback(fallback(ran, CUDA), ran, CUDA)
    text = str(caught.value)
    assert text.startswith(
        f"onnxruntime ran 11 of 11 nodes on another provider than {CUDA}: conv0 (Conv, {CPU}), conv1"
    )
    assert "conv7" in text
    assert "conv8" not in text
    assert "and 3 more" in text
    assert "--allow-fallback" in text
    assert "\n" not in text
    refuse_fallback([], ran, CPU)


def test_inserted_casts_are_those_that_are_not_in_the_file() -> None:
    half, single = ("float16", (1, 8)), ("float", (1, 8))
    ran = [
        Kernel("node_cast", "Cast", CPU, (single,), (half,)),
        Kernel("InsertedPrecisionFreeCast_x", "Cast", CPU, (half,), (single,)),
        Kernel("InsertedPrecisionFreeCast_y", "Cast", CPU, (half,), (single,)),
        Kernel("InsertedPrecisionFreeCast_z", "Cast", CPU, (single,), (half,)),
        Kernel("InsertedPrecisionFreeCast_relu", "Relu", CPU, (single,), (single,)),
    ]
    assert inserted_casts(ran, ["node_cast"]) == {"float16 to float32": 2, "float32 to float16": 1}


def test_what_tensorrt_compiled_is_not_said_to_be_float() -> None:
    provider, operator = "TensorrtExecutionProvider", "TRTKernel_graph_main_graph_1"
    engine = Kernel(f"{provider}_{operator}_0", operator, provider, (("float", (1, 3, 8, 8)),))
    assert precision([engine]) == "TensorRT's choice in 1 engine"
    gemm = Kernel("fc", "Gemm", CUDA, (("float16", (1, 8)),))
    assert precision([engine, engine, gemm]) == "TensorRT's choice in 2 engines, else float16"
