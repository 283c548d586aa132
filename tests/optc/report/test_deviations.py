from __future__ import annotations

from optc.report.deviations import deviations

CPU = "CPUExecutionProvider"


def test_nothing_is_said_where_all_is_as_asked() -> None:
    assert deviations({"opset": 23, "providers": {CPU: 4}, "fallback": [], "not_int8": {}, "check": {}}) == []


def test_nodes_with_one_reason_share_a_row() -> None:
    lowering = {
        "fallback": [
            {"node": "a", "operator": "Conv", "provider": CPU},
            {"node": "b", "operator": "Relu", "provider": CPU},
        ],
        "not_int8": {"conv (stem)": "its input is float", "fc": "no kernel", "head": "no kernel"},
        "not_float16": {"fc": "no kernel"},
        "inserted_casts": {"float16 to float32": 2, "float32 to float16": 1},
    }
    assert deviations(lowering) == [
        (f"on {CPU}", "a (Conv), b (Relu)", "the provider asked for did not take them"),
        ("not int8", "conv (stem)", "its input is float"),
        ("not int8", "fc, head", "no kernel"),
        ("not float16", "fc", "no kernel"),
        ("casts added", "2 float16 to float32, 1 float32 to float16", "the runtime lacks kernels in the graph's type"),
    ]


def test_long_lists_are_cut_unless_asked_for() -> None:
    lowering = {"not_int8": {f"layer{index}": "no kernel" for index in range(11)}}
    ((_, short, _),) = deviations(lowering)
    assert short.startswith("layer0, layer1, ")
    assert "layer7 and 3 more" in short
    ((_, whole, _),) = deviations(lowering, every=True)
    assert whole.endswith("layer10")


def test_what_other_backends_call_so_is_theirs() -> None:
    assert deviations({"not_mine": ["a list"]}) == []


def test_those_of_a_pipelines_stages_say_which() -> None:
    stages = [
        {"stage": 0, "not_int8": {"conv": "no kernel"}},
        {"stage": 1, "fallback": [{"node": "a", "operator": "Conv", "provider": CPU}], "not_int8": {"fc": "no kernel"}},
    ]
    assert deviations({"stages": stages, "check": {}}) == [
        ("not int8", "stage 0: conv, stage 1: fc", "no kernel"),
        (f"on {CPU}", "stage 1: a (Conv)", "the provider asked for did not take them"),
    ]
