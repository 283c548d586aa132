from __future__ import annotations

import json
from pathlib import Path

import pytest

from optc import Target
from optc.bench.submission import Submission, slug

SYSTEM_FIELDS = (
    "division",
    "submitter",
    "status",
    "system_name",
    "number_of_nodes",
    "host_processor_model_name",
    "host_processors_per_node",
    "host_processor_core_count",
    "host_memory_capacity",
    "host_storage_capacity",
    "host_storage_type",
    "accelerators_per_node",
    "accelerator_model_name",
    "accelerator_memory_capacity",
    "framework",
    "operating_system",
    "system_type",
    "other_software_stack",
    "host_processor_frequency",
    "host_processor_caches",
    "host_memory_configuration",
    "host_processor_interconnect",
    "host_networking",
    "host_networking_topology",
    "accelerator_frequency",
    "accelerator_host_interconnect",
    "accelerator_interconnect",
    "accelerator_interconnect_topology",
    "accelerator_memory_configuration",
    "accelerator_on-chip_memories",
    "cooling",
    "hw_notes",
    "sw_notes",
    "host_network_card_count",
    "system_type_detail",
)
"""What ``SYSTEM_DESC_REQUIRED_FIELDS`` of MLPerf's submission checker (mlcommons/inference) asks for."""
MEASUREMENT_FIELDS = (
    "input_data_types",
    "retraining",
    "starting_weights_filename",
    "weight_data_types",
    "weight_transformations",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    submission = Submission(tmp_path, Target(threads=2))
    for folder in (submission.performance("a/b c", "Offline"), submission.accuracy("a/b c", "Offline")):
        folder.mkdir(parents=True)
    submission.describe(
        {"a/b c": "int8", "never ran": ""}, {"Offline": None}, {"a/b c": "", "never ran": ""}, ["optc x"]
    )
    return tmp_path / "open" / "optc"


def test_the_folders_are_those_of_the_submission_checker(root: Path) -> None:
    (system,) = (root / "results").iterdir()
    assert json.loads((root / "model_mapping.json").read_text()) == {"a-b-c": "resnet", "never-ran": "resnet"}
    assert [path.name for path in system.iterdir()] == ["a-b-c"]
    scenario = system / "a-b-c" / "Offline"
    assert sorted(path.relative_to(scenario).as_posix() for path in scenario.rglob("*")) == [
        "README.md",
        "accuracy",
        "measurements.json",
        "performance",
        "performance/run_1",
        "user.conf",
    ]
    assert "optc x" in (scenario / "README.md").read_text()
    assert (scenario / "user.conf").read_text()
    assert (root / "src" / "README.md").exists()
    assert (root / "systems" / f"{system.name}.json").exists()


def test_every_field_the_checker_wants_is_there(root: Path) -> None:
    (system,) = (root / "systems").iterdir()
    described = json.loads(system.read_text())
    assert set(SYSTEM_FIELDS) <= set(described)
    assert all(described[field] for field in SYSTEM_FIELDS if field != "sw_notes")
    assert (described["division"], described["submitter"], described["status"]) == ("open", "optc", "rdi")
    (measurements,) = root.rglob("measurements.json")
    found = json.loads(measurements.read_text())
    assert set(MEASUREMENT_FIELDS) == {field for field, value in found.items() if value}
    assert found["weight_data_types"] == "int8"


def test_names_become_one_part_of_a_path() -> None:
    assert slug("timm:vit/tiny eager-fp32") == "timm-vit-tiny-eager-fp32"
    assert slug("../..") == "model"


def test_two_targets_have_two_folders(tmp_path: Path) -> None:
    submission = Submission(tmp_path, Target(threads=1))
    names = ("../old/r50", "old/r50", "old-r50")
    folders = [submission.performance(name, "SingleStream") for name in names]
    assert len(set(folders)) == 3
    assert submission.performance("old/r50", "SingleStream") == folders[1]
    submission.describe(dict.fromkeys(names, ""), {}, dict.fromkeys(names, ""), [])
    (mapping,) = tmp_path.rglob("model_mapping.json")
    assert list(json.loads(mapping.read_text())) == ["old-r50", "old-r50-2", "old-r50-3"]
