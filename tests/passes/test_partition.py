"""The pass ``partition`` on real models: what it leaves in the graph, what it says, what it refuses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optc
from optc.lowering.node_times import node_times
from optc.program import Program
from optc.report.stages import Prediction
from optc.stages import run_stages, split
from optc.torchvision_ops import declare_torchvision_ops
from optc_passes.fuse import Fuse
from optc_passes.partition import Partition
from optc_passes.partition_costs import local_devices
from optc_passes.partition_devices import KNOWN, parse
from optc_passes.partition_graph import Work, few_alive, row


@pytest.fixture(scope="module")
def vit() -> Program:
    torch.manual_seed(0)
    declare_torchvision_ops()  # before timm imports torchvision
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4).eval()
    return optc.capture(model, (torch.randn(1, 3, 32, 32),))


def stages_of(program: Program) -> list[int]:
    return [node.meta["stage"] for node in program.graph.nodes if node.op == "call_function"]


def account_of(result: optc.PassResult) -> list[Mapping[str, Any]]:
    account = result.program.history[-1].notes["account"]
    assert json.loads(json.dumps(account)) == account
    return list(account)


def slowest(account: list[Mapping[str, Any]]) -> float:
    return max(each["receive_seconds"] + each["compute_seconds"] + each["send_seconds"] for each in account)


def check_split(before: Program, after: Program, batch: int = 3) -> None:
    """The stages, each with nothing but what the one before sent, compute what the model did."""
    inputs = [torch.randn(batch, *example.shape[1:]) for example in before.example_inputs]
    for got, want in zip(run_stages(split(after), *inputs), before.run(*inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_every_node_has_a_stage_and_the_stages_compute_what_the_model_did(vit: Program) -> None:
    result = Partition(devices="4xa100", microbatches=4)(vit)
    found = stages_of(result.program)
    assert found == sorted(found)
    assert set(found) == {0, 1, 2, 3}
    assert [node.name for node in result.program.graph.nodes] == [node.name for node in vit.graph.nodes]
    check_split(vit, result.program)
    account = account_of(result)
    assert [each["device"] for each in account] == ["a100"] * 4
    for each, stage in zip(account, split(result.program), strict=True):
        assert each["weight_bytes"] == stage.program.constant_bytes()
        assert [cut["name"] for cut in each["cut"]] == (
            [wire.name for wire in stage.sends] if each["stage"] < 3 else []
        )
        assert each["timing"] == "roofline"
    assert sum(each["compute_seconds"] for each in account) == pytest.approx(account[0]["whole_seconds"])
    assert not Partition(devices="4xa100", microbatches=4)(result.program).modified


@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenetv3_small_100", marks=pytest.mark.slow)])
def test_convolutional_networks(name: str) -> None:
    declare_torchvision_ops()  # before timm imports torchvision
    import timm

    program = Fuse()(optc.capture(timm.create_model(name).eval(), (torch.randn(1, 3, 64, 64),))).program
    result = Partition(devices="4xl4", microbatches=4)(program)
    check_split(program, result.program)
    for each, stage in zip(account_of(result), split(result.program), strict=True):
        assert each["weight_bytes"] == stage.program.constant_bytes()
        if each["stage"] < 3:
            assert each["send_bytes"] == sum(wire.bytes(1) for wire in stage.sends)


def test_it_runs_after_fuse(vit: Program) -> None:
    fused = Fuse()(vit).program
    result = Partition(stages=3)(fused)
    assert set(stages_of(result.program)) == {0, 1, 2}
    check_split(vit, result.program)


def test_a_microbatch_of_several_images_takes_and_sends_as_many_times_as_much(vit: Program) -> None:
    one = account_of(Partition(devices="2xl4", microbatches=2)(vit))
    four = account_of(Partition(devices="2xl4", microbatches=2, batch=8)(vit))
    assert [each["microbatch"] for each in (one[0], four[0])] == [1, 4]
    assert four[0]["send_bytes"] == 4 * one[0]["send_bytes"]
    assert four[0]["activation_bytes"] == 4 * one[0]["activation_bytes"]
    assert four[0]["cut"][0]["shape"] == [4, *one[0]["cut"][0]["shape"][1:]]
    assert one[0]["compute_seconds"] < four[0]["compute_seconds"] <= 4 * one[0]["compute_seconds"]


def test_a_microbatch_is_a_part_of_the_targets_batch(vit: Program) -> None:
    six = optc.PassContext(target=optc.Target(batch=6))
    assert account_of(Partition(devices="2xl4", microbatches=2)(vit, six))[0]["microbatch"] == 3
    assert account_of(Partition(devices="2xl4", microbatches=8)(vit, six))[0]["microbatch"] == 1
    with pytest.raises(optc.OptcError, match="4 microbatches do not divide a batch of 6"):
        Partition(devices="2xl4", microbatches=4)(vit, six)


def test_threads_that_are_not_there_are_noted(vit: Program) -> None:
    notes: list[str] = []
    context = optc.PassContext(target=optc.Target(threads=2), note=notes.append)
    Partition(devices="2xcpu:1")(vit, context)
    assert not notes
    Partition(devices="2xcpu:4")(vit, context)
    assert notes == [
        "the stages have 8 threads, and 2 are at hand: they will take turns, and the pipeline is slower than predicted"
    ]


def test_the_faster_device_gets_more(vit: Program, tmp_path: Path) -> None:
    devices = tmp_path / "two.toml"
    fast = "base = 'l4'\ntflops = { float32 = 60.6 }\nbandwidth_gb_s = 600\nlink_us = 0\nlink_gb_s = 1000"
    devices.write_text(f"[[device]]\nname = 'twice'\n{fast}\n[[device]]\nname = 'l4'\nbase = 'l4'\nlink_us = 0\n")
    account = account_of(Partition(devices=str(devices))(vit))
    assert [each["device"] for each in account] == ["twice", "l4"]
    parts = [each["compute_seconds"] / each["whole_seconds"] for each in account]
    assert parts[0] > 0.55
    assert parts[1] < 0.45
    turned = tmp_path / "turned.toml"
    first, second = devices.read_text().split("[[device]]")[1:]
    turned.write_text(f"[[device]]{second}[[device]]{first}")
    assert account_of(Partition(devices=str(turned))(vit))[1]["nodes"] > account[1]["nodes"]


class Tied(nn.Module):
    """One large layer, used at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(64, 64)
        self.between = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.shared(x)
        return self.shared(self.between(hidden)) + hidden


def test_tied_weights_are_in_each_stage_that_reads_them_and_in_none_twice() -> None:
    model = Tied().eval()
    program = optc.capture(model, (torch.randn(1, 64),))
    result = Partition(devices="2xl4")(program)
    layer = (64 * 64 + 64) * 4
    account = account_of(result)
    assert sum(each["weight_bytes"] for each in account) == 6 * layer  # five layers, the tied one in both stages
    assert account[0]["whole_bytes"] - 5 * layer < layer
    check_split(program, result.program)


class TwoBranches(nn.Module):
    """Computed side by side, both branches' wide values are alive at once; one after the other, only one is."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.ModuleList([nn.Linear(8, 256) for _ in range(4)])
        self.narrow = nn.ModuleList([nn.Linear(256, 8) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = [layer(x).relu() for layer in self.widen]
        return torch.stack([layer(each) for layer, each in zip(self.narrow, wide, strict=True)]).sum(0)


def test_another_order_is_taken_where_it_keeps_less_alive() -> None:
    program = optc.capture(TwoBranches().eval(), (torch.randn(1, 8),))
    work = Work(program, 1)
    given, other = row(work, work.units), row(work, few_alive(work))
    assert other.carried[1:-1].max() < given.carried[1:-1].max()
    assert sorted(map(id, other.units)) == sorted(map(id, given.units))
    result = Partition(devices="2xl4")(program)
    names = [node.name for node in result.program.graph.nodes if node.op == "call_function"]
    assert names != [node.name for node in program.graph.nodes if node.op == "call_function"]
    result.program.graph.lint()
    check_split(program, result.program)
    assert not Partition(devices="2xl4")(result.program).modified


class SeveralResults(nn.Module):
    """An operator with several results, a value that skips far, an early output, an input that is read late."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (x @ x.mT).relu().split(4, dim=1)
        early = first.sin()
        late = (second.cos() + 1).exp().sin().cos()
        return early, late + y.mean(1, keepdim=True) + second


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_values_that_cross_several_cuts(stages: int) -> None:
    program = optc.capture(SeveralResults().eval(), (torch.randn(2, 8, 8), torch.randn(2, 4, 8)))
    result = Partition(devices=f"{stages}xh100")(program)
    check_split(program, result.program)
    for each, stage in itertools.pairwise(split(result.program)):
        assert each.sends == stage.receives


def test_it_never_cuts_where_a_value_has_the_batch_twice() -> None:
    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.sin().cos()
            pairs = (x @ x.T).relu().sin().cos().exp()
            return (pairs @ x).sin().cos()

    program = optc.capture(Pairs().eval(), (torch.randn(3, 4),))
    result = Partition(devices="4xh100")(program)
    check_split(program, result.program)
    with pytest.raises(optc.OptcError, match=r"cannot be cut into 7 stages: .* 5 places where everything alive"):
        Partition(devices="7xh100")(program)


def test_measured_times_are_used_where_the_device_is_here(vit: Program) -> None:
    names = [node.name for node in vit.graph.nodes if node.op == "call_function"]
    calls = []

    def lopsided(program: Program, device: str, threads: int, batch: int) -> dict[str, float]:
        calls.append((device, threads, batch))
        return {name: 1.0 if name == "conv2d" else 1e-6 for name in names}

    context = optc.PassContext(node_times=lopsided)
    result = Partition(devices="1xcpu:1,2xcpu:2", microbatches=3, batch=6)(vit, context)
    assert sorted(calls) == [("cpu", 1, 2), ("cpu", 2, 2)]
    account = account_of(result)
    assert [each["timing"] for each in account] == ["measured"] * 3
    assert account[0]["nodes"] == 1
    simulated = account_of(Partition(devices="1xcpu:1,2xcpu:2", simulate=True)(vit, context))
    assert [each["timing"] for each in simulated] == ["roofline"] * 3
    elsewhere = account_of(Partition(devices="2xh100")(vit, context))
    assert [each["timing"] for each in elsewhere] == ["roofline"] * 2
    assert len(calls) == 2


def test_nodes_are_timed_in_the_eager_backend(vit: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.lowering.kernel_times.SECONDS", 0.01)
    fused = Fuse()(vit).program
    threads = torch.get_num_threads()
    found = node_times(fused, "cpu", 1, 1)
    assert torch.get_num_threads() == threads
    assert set(found) == {node.name for node in fused.graph.nodes}
    layers = [node for node in fused.graph.nodes if "linear" in str(node.target)]
    assert all(found[node.name] > 0 for node in layers)
    first = [node for node in layers if tuple(node.meta["val"].shape[1:]) == (5, 576)]
    assert len(first) == 4
    assert len({found[node.name] for node in first}) == 1  # they do the same


def test_models_of_a_type_that_numpy_has_not_are_timed() -> None:
    program = optc.capture(nn.Linear(8, 8).bfloat16().eval(), (torch.randn(2, 8).bfloat16(),))
    assert sum(node_times(program, "cpu", 1, 2).values()) > 0


@pytest.mark.gpu
def test_timing_nodes_on_a_gpu_moves_nothing_there(vit: Program) -> None:
    found = node_times(Fuse()(vit).program, "cuda", 1, 1)
    assert sum(found.values()) > 0
    assert {tensor.device.type for _, tensor in vit.constants()} == {"cpu"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 3, "devices": "2xh100"}, "2 devices ('2xh100') for 3 stages"),
        ({"devices": "200xh100"}, "200 stages for 83 operators"),
        ({"microbatches": 3, "batch": 8}, "3 microbatches do not divide a batch of 8"),
        ({"devices": "2xh1000"}, "unknown device 'h1000' — did you mean h100"),
        ({"devices": "2xcpu"}, "a CPU needs its number of threads"),
        ({"devices": "0xh100"}, "'0xh100' are no devices"),
        ({"devices": "two gpus"}, "cannot read device 'two gpus'"),
        ({"devices": "h100:2"}, "only a CPU has threads"),
        ({"devices": "none.toml"}, "cannot read the devices of 'none.toml': No such file"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(vit: Program, options: dict[str, Any], message: str) -> None:
    with pytest.raises(optc.OptcError) as error:
        Partition(**options)(vit)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_for_one_batch_size_has_microbatches_of_that() -> None:
    program = optc.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(3, 4),), dynamic_batch=False)
    account = account_of(Partition(devices="2xh100", microbatches=2)(program))
    assert account[0]["microbatch"] == 3
    assert account[0]["cut"][0]["shape"] == [3, 4]
    with pytest.raises(optc.OptcError, match="batch size 3 only, a microbatch has 1 — give a batch of 6"):
        Partition(devices="2xh100", microbatches=2, batch=2)(program)


def test_a_stage_too_large_for_its_device_is_refused_with_the_numbers(vit: Program, tmp_path: Path) -> None:
    whole = account_of(Partition(devices="2xl4")(vit))[0]["whole_bytes"]
    small = tmp_path / "small.toml"
    small.write_text(f"[[device]]\nname = 'small'\nbase = 'l4'\ncount = 2\nmemory_gb = {0.3 * whole / 1e9:.9f}\n")
    with pytest.raises(
        optc.OptcError, match=r"too large for its device\. At best stage \d needs 0\.00\d+ GB \(weights"
    ):
        Partition(devices=str(small))(vit)
    small.write_text(small.read_text().replace("count = 2", "count = 5"))
    limit = round(0.3 * whole)
    account = account_of(Partition(devices=str(small))(vit))
    assert all(each["weight_bytes"] + each["activation_bytes"] <= limit for each in account)
    with pytest.raises(optc.OptcError, match="too large for its device"):  # the CPU's memory, shared by its stages
        Partition(devices="2xcpu:1")(vit, optc.PassContext(memory=whole))
    halves = Partition(devices="2xcpu:1")(vit, optc.PassContext(memory=round(1.4 * whole)))
    assert account_of(halves)[0]["memory_bytes"] < whole
    assert Prediction.of(halves.program.history).alone_fits  # alone it would have all of the memory
    assert not Prediction.of(Partition(devices=str(small))(vit).program.history).alone_fits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[device]", "is no TOML"),
        ("name = 'x'", "holds no list of devices"),
        ("[[device]]\nname = 'x'", "device 1: tflops.float32 is missing"),
        ("[[device]]\nname = 'x'\nbase = 'h100'\nmemory = 3", "device 1: memory: Extra inputs"),
        ("[[device]]\nname = 'x'\nbase = 'h100'\n[[device]]\nname = 'y'\nbase = 'h99'", "unknown device 'h99'"),
        ("[[device]]\nname = 'x'\nbase = 'h100'\nmemory_gb = 0", "memory_gb: Input should be greater than 0"),
        ("[[device]]\nname = 'x'\nbase = 'h100'\ntflops = { float32 = 0 }", "tflops must be above 0"),
        (
            "[[device]]\nname = 'x'\nbase = 'h100'\ntflops = { float32 = nan }",
            "Input should be a finite number",
        ),
        ("[[device]]\nname = 'x'\nbase = 'h100'\nmemory_gb = inf", "Input should be a finite number"),
        ("[[device]]\nname = 'x'\nbase = 'devices.toml'", "base 'devices.toml' is a file"),
    ],
)
def test_a_bad_file_of_devices(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "devices.toml"
    path.write_text(text)
    with pytest.raises(optc.OptcError) as error:
        parse(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_describes_devices(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    own = "tflops = { float32 = 10 }\nbandwidth_gb_s = 500\nlink_gb_s = 5\nlink_us = 30"
    path.write_text(
        f"[[device]]\nname = 'big'\nbase = 'h100'\nmemory_gb = 96\n[[device]]\nname = 'own'\ncount = 2\n{own}\n"
    )
    big, own_one, own_two = parse(str(path))
    assert (big.name, big.memory, big.flops) == ("big", 96_000_000_000, KNOWN["h100"].flops)
    assert own_one == own_two
    assert (own_one.peak("bfloat16"), own_one.memory, own_one.link_latency) == (10e12, None, pytest.approx(30e-6))
    assert [device.name for device in parse("1xh100, 2xa100,l4")] == ["h100", "a100", "a100", "l4"]


def test_a_cpu_is_this_machines_where_it_is_named_so(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text("[[device]]\nname = 'cpu:8'\nbase = 'cpu:8'\nlink_us = 5\n[[device]]\nname = 'x'\nbase = 'cpu:8'\n")
    here, other = parse(str(path))
    assert (here.threads, other.threads) == (8, 0)  # what has no threads here is not measured here
    assert other.flops == here.flops


@pytest.mark.gpu
def test_the_gpu_at_hand_has_no_more_memory_than_it_has() -> None:
    (device,) = local_devices(optc.PassContext(target=optc.Target(device="cuda")), 1)
    assert device.memory is not None
    assert device.memory <= torch.cuda.get_device_properties(0).total_memory


def test_ten_thousand_nodes_into_64_stages() -> None:
    program = optc.capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    (layer,) = (node for node in program.graph.nodes if node.op == "call_function")
    last, skipped = layer, layer
    aten = torch.ops.aten
    with program.graph.inserting_before(program.graph.output_node()):
        for index in range(10_000 - 1):
            if index % 4 == 3:
                new, skipped = program.graph.call_function(aten.add.Tensor, (last, skipped)), last
            else:
                new = program.graph.call_function(aten.sin.default, (last,))
            new.meta |= {"val": layer.meta["val"], "dims": layer.meta["dims"]}
            last = new
        program.graph.output_node().args = ((last,),)
    result = Partition(devices="64xh100", microbatches=64)(program)
    account = account_of(result)
    assert sum(each["nodes"] for each in account) == 10_000
    stages = stages_of(result.program)
    assert stages == sorted(stages)
    assert set(stages) == set(range(64))
    even = account[0]["whole_seconds"] / 64 + account[0]["send_seconds"] + account[1]["receive_seconds"]
    assert slowest(account) < even * 1.1
