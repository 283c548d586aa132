"""Loading .pt2 files, and refusing those whose loading could run code."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from optc import capture
from optc.errors import OptcError
from optc.frontend.load import load_model
from optc.frontend.pt2_safety import checked_copy
from optc.frontend.pt2_source import load_exported

Members = dict[str, bytes]


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()


@pytest.fixture(scope="module")
def file(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "m.pt2"
    exported = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: Dim.DYNAMIC},))
    torch.export.save(exported, path)
    return path


def refuse_unsafe(path: Path) -> None:
    with checked_copy(path):
        pass


def rewritten(file: Path, target: Path, edit: Callable[[Members], None]) -> Path:
    """A copy of an archive with its members edited (by name without the top folder)."""
    with zipfile.ZipFile(file) as archive:
        top = archive.namelist()[0].partition("/")[0]
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{top}/{name}", content)
    return target


def edit_graph(change: Callable[[Any], None]) -> Callable[[Members], None]:
    def edit(members: Members) -> None:
        model = json.loads(members["models/model.json"])
        change(model)
        members["models/model.json"] = json.dumps(model).encode()

    return edit


def first_node(model: Any) -> Any:
    return model["graph_module"]["graph"]["nodes"][0]


def size(expression: str) -> Callable[[Any], None]:
    """Give the first operator a symbolic integer argument."""
    argument = {"as_sym_int": {"as_expr": {"expr_str": expression}}}
    return lambda model: first_node(model)["inputs"][0].update(arg=argument)


def test_roundtrip_computes_the_same_at_any_batch(model: nn.Module, file: Path) -> None:
    loaded = load_model(str(file))
    assert (loaded.info.source, loaded.info.weights, loaded.info.weights_detail) == ("pt2", "given", "inside m.pt2")
    assert loaded.info.preprocessing.input_size == (3, 8, 8)
    program = capture(loaded.module, loaded.example_inputs, info=loaded.info)
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(program.run(x)[0], model(x))


def test_file_exported_for_one_batch_size_is_captured_for_it(model: nn.Module, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(model, (torch.randn(4, 3, 8, 8),)), tmp_path / "four.pt2")
    loaded = load_model(str(tmp_path / "four.pt2"))
    program = capture(loaded.module, loaded.example_inputs, info=loaded.info)
    assert not program.dynamic_batch
    assert (
        "captured for batch size 4 only, the batch cannot vary: it was exported for one batch size"
        in program.info.notes[-1]
    )
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(program.run(x)[0], model(x))


def test_rewriting_alone_is_not_refused(file: Path, tmp_path: Path) -> None:
    refuse_unsafe(rewritten(file, tmp_path / "same.pt2", lambda members: None))


def pickled_inputs(folder: Path) -> Callable[[Members], None]:
    buffer = io.BytesIO()
    torch.save(Evil(folder / "pwned"), buffer)
    return lambda members: members.update({"data/sample_inputs/model.pt": buffer.getvalue()})


def opaque_constant(folder: Path) -> Callable[[Members], None]:
    config = {
        "config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}
    }
    return lambda members: members.update(
        {
            "data/constants/model_constants_config.json": json.dumps(config).encode(),
            "data/constants/opaque_obj_0": pickle.dumps(Evil(folder / "pwned")),
        }
    )


def pickled_weight(folder: Path) -> Callable[[Members], None]:
    def edit(members: Members) -> None:
        config = json.loads(members["data/weights/model_weights_config.json"])
        payload = next(iter(config["config"].values()))
        payload["use_pickle"] = True
        buffer = io.BytesIO()
        torch.save(Evil(folder / "pwned"), buffer)
        members[f"data/weights/{payload['path_name']}"] = buffer.getvalue()
        members["data/weights/model_weights_config.json"] = json.dumps(config).encode()

    return edit


@pytest.mark.parametrize("attack", [pickled_inputs, opaque_constant, pickled_weight])
def test_pickles_are_refused_though_torch_would_run_them(
    attack: Callable[[Path], Callable[[Members], None]], file: Path, tmp_path: Path
) -> None:
    path = rewritten(file, tmp_path / "evil.pt2", attack(tmp_path))
    with pytest.raises(OptcError, match=r"holds pickled .* and loading that could run code"):
        load_model(str(path))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: first_node(m).update(target="torch.hub.load"), "calls 'torch.hub.load'"),
        (lambda m: first_node(m).update(target="torch.ops.load_library.__call__"), "calls 'torch.ops.load_library"),
        (lambda m: first_node(m).update(target="torch.ops.aten.from_file.default"), "calls 'torch.ops.aten.from_file"),
        (lambda m: first_node(m).update(target="_operator.call"), "calls '_operator.call'"),
        (size("__import__('os')"), "shape expression"),
        (size("s0.func"), "shape expression"),
        (size("exec(s0)"), "shape expression"),
        (lambda m: m["range_constraints"].update({"eval(s1)": {"min_val": 2, "max_val": None}}), "shape expressions"),
        (lambda m: first_node(m)["outputs"][0]["as_tensor"].update(name="x=print()\n"), "names a value"),
        (lambda m: forward_arguments(m).append("y=print()"), r"names a value 'y=print\(\)'"),
        (lambda m: weights(m)[0]["parameter"].update(parameter_name='w"),print(), ("'), "names a value 'w\""),
        (lambda m: m["graph_module"].update({"x=print()": 1}), "names a value 'x="),
        (lambda m: hidden(m, "metadata"), "shape expression"),
        (lambda m: hidden(m, "as_string"), "shape expression"),
        (lambda m: called(m)["signature"].update(in_spec=spec({"__enum__": True, "fqn": "a:b"})), "module in its in_"),
        (lambda m: called(m)["signature"].update(out_spec=spec({"default_factory_module": "a"})), "module in its out_"),
    ],
)  # fmt: skip
def test_graphs_that_reach_beyond_tensors_are_refused(
    change: Callable[[Any], None], reason: str, file: Path, tmp_path: Path
) -> None:
    path = rewritten(file, tmp_path / "evil.pt2", edit_graph(change))
    with pytest.raises(OptcError, match=reason):
        refuse_unsafe(path)


def called(model: Any) -> Any:
    return model["graph_module"]["module_call_graph"][0]


def forward_arguments(model: Any) -> Any:
    return called(model)["signature"]["forward_arg_names"]


def hidden(model: Any, name: str) -> None:
    """Give a size that is called like a text of PyTorch's."""
    size = {"as_expr": {"expr_str": "print()", "hint": None}}
    model["graph_module"]["graph"]["sym_int_values"][name] = size


def spec(context: Any) -> str:
    """A tree of inputs that holds one dictionary, its keys as JSON that hides theirs."""
    quoted = json.dumps(context).replace("_", "\\u005f")
    return json.dumps([1, {"type": "builtins.dict", "context": quoted, "children_spec": []}])


def weights(model: Any) -> Any:
    return [each for each in model["graph_module"]["signature"]["input_specs"] if "parameter" in each]


def test_an_older_format_is_not_hidden_beside_a_newer_one(file: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "pwned"), buffer)
    for number, name in enumerate(("serialized_constants.pt", "b/models/model.json")):
        path = tmp_path / f"{number}.pt2"
        with zipfile.ZipFile(file) as honest, zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, buffer.getvalue())
            for member in honest.namelist():
                archive.writestr(member, honest.read(member))
        with pytest.raises(OptcError, match="has members outside its folder"):
            load_model(str(path))
    assert not (tmp_path / "pwned").exists()


def test_strings_that_operators_take_are_not_names(tmp_path: Path) -> None:
    class Attends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum("bij,bkj->bik", x, x)

    torch.export.save(torch.export.export(Attends(), (torch.randn(2, 3, 4),)), tmp_path / "a.pt2")
    refuse_unsafe(tmp_path / "a.pt2")


def test_machine_code_and_doubled_members_are_refused(file: Path, tmp_path: Path) -> None:
    code = rewritten(file, tmp_path / "a.pt2", lambda members: members.update({"data/aotinductor/model/x.so": b""}))
    with pytest.raises(OptcError, match="holds compiled machine code"):
        refuse_unsafe(code)
    doubled = rewritten(file, tmp_path / "b.pt2", lambda members: None)
    with zipfile.ZipFile(doubled, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"")
    with pytest.raises(OptcError, match="two members of one name"):
        refuse_unsafe(doubled)


@pytest.mark.parametrize("name", ["models/x/y.json", "models/evilABCDE", "Data/sample_inputs/model.pt"])
def test_members_that_only_torch_would_read_are_refused(name: str, file: Path, tmp_path: Path) -> None:
    def add(members: Members) -> None:
        members.pop("data/sample_inputs/model.pt")
        members[name] = b"{}"

    with pytest.raises(OptcError, match=f"holds '{name}', which is not looked into"):
        refuse_unsafe(rewritten(file, tmp_path / "a.pt2", add))


def test_torch_reads_what_was_checked(file: Path, tmp_path: Path) -> None:
    """Of two archives in one file Python reads the second, PyTorch the first: there is a directory where it looks."""

    def zero(members: Members) -> None:
        members["data/weights/weight_0"] = bytes(len(members["data/weights/weight_0"]))

    zeroed, same = rewritten(file, tmp_path / "0.pt2", zero), rewritten(file, tmp_path / "1.pt2", lambda members: None)
    both = tmp_path / "both.pt2"
    both.write_bytes(zeroed.read_bytes() + same.read_bytes())
    assert torch.export.load(both).state_dict["0.weight"].count_nonzero() == 0
    weight = torch.export.load(file).state_dict["0.weight"]
    torch.testing.assert_close(load_exported(both).state_dict["0.weight"], weight)


def encrypted(data: bytes) -> bytes:
    return changed(data, 8, 1)


def in_an_unknown_way(data: bytes) -> bytes:
    return changed(data, 10, 77)


def changed(data: bytes, offset: int, value: int) -> bytes:
    """A field of two bytes of the directory's first entry replaced."""
    entry = data.index(b"PK\x01\x02") + offset
    return data[:entry] + value.to_bytes(2, "little") + data[entry + 2 :]


@pytest.mark.parametrize("change", [encrypted, in_an_unknown_way])
def test_members_that_python_cannot_read_give_one_line(
    change: Callable[[bytes], bytes], file: Path, tmp_path: Path
) -> None:
    path = rewritten(file, tmp_path / "a.pt2", lambda members: None)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(OptcError, match=r"is not a readable \.pt2 file"):
        refuse_unsafe(path)


def test_deep_json_gives_one_line(file: Path, tmp_path: Path) -> None:
    deep = b"[" * 100_000
    path = rewritten(file, tmp_path / "a.pt2", lambda members: members.update({"models/model.json": deep}))
    with pytest.raises(OptcError, match=r"is not a readable \.pt2 file"):
        refuse_unsafe(path)


@pytest.mark.parametrize("content", [b"", b"PK no zip", None])
def test_other_files_give_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/readme", "hello")
    else:
        path.write_bytes(content)
    with pytest.raises(OptcError, match=r"is not a readable \.pt2 file") as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file_and_keyword_inputs(tmp_path: Path) -> None:
    with pytest.raises(OptcError, match="does not exist"):
        load_model(str(tmp_path / "none.pt2"))
    exported = torch.export.export(nn.Linear(2, 2), (), {"input": torch.randn(2, 2)})
    torch.export.save(exported, tmp_path / "kw.pt2")
    with pytest.raises(OptcError, match="takes other inputs than positional tensors"):
        load_model(str(tmp_path / "kw.pt2"))


class Dashed(nn.Module):
    """Two inputs of one dynamic batch, and a name as torchvision's RegNets have them."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("block1-0", nn.Linear(4, 4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.get_submodule("block1-0")(x) + y


def test_dashes_and_checks_of_inputs_are_ordinary(tmp_path: Path) -> None:
    inputs = (torch.randn(3, 4), torch.randn(3, 4))
    shapes = {"x": {0: Dim.DYNAMIC}, "y": {0: Dim.DYNAMIC}}
    torch.export.save(torch.export.export(Dashed(), inputs, dynamic_shapes=shapes), tmp_path / "a.pt2")
    loaded = load_model(str(tmp_path / "a.pt2"))
    torch.testing.assert_close(loaded.module(*inputs).shape, torch.Size((3, 4)))
