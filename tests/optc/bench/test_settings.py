from __future__ import annotations

from pathlib import Path

import pytest

from optc.bench import loadgen
from optc.bench.settings import check_user_conf, loadgen_settings
from optc.errors import MeasurementError


def test_mlperfs_defaults_then_what_is_asked_then_the_users_file(tmp_path: Path) -> None:
    conf = tmp_path / "user.conf"
    conf.write_text(
        "# mine\n*.Server.target_latency = 20\nresnet.Server.target_latency = 30\n*.*.min_query_count = 7\n"
    )
    plain = loadgen_settings("Server", "resnet", {}, None)
    assert (plain.server_target_latency_ns, plain.min_duration_ms) == (10_000_000, 600_000)
    assert plain.qsl_rng_seed > 0
    asked = loadgen_settings("Server", "resnet", {"min_duration_ms": 5, "min_query_count": 9}, conf)
    assert (asked.min_duration_ms, asked.min_query_count) == (5, 7)
    assert asked.server_target_latency_ns == 30_000_000
    assert loadgen_settings("Server", "alexnet", {}, conf).server_target_latency_ns == 20_000_000


@pytest.mark.parametrize("name", ["resnet50", "bert", "retinanet"])
def test_the_name_of_a_model_sets_no_limits(name: str, tmp_path: Path) -> None:
    conf = tmp_path / "user.conf"
    conf.write_text(f"{name}.Server.target_qps = 5\n")
    for scenario in ("Server", "Offline", "SingleStream", "MultiStream"):
        named, other = (loadgen_settings(scenario, each, {}, None) for each in (name, f"{name}-int8"))
        for field in ("server_target_latency_ns", "min_query_count", "performance_sample_count_override"):
            assert getattr(named, field) == getattr(other, field)
    assert loadgen_settings("Server", name, {}, conf).server_target_qps == 5.0


@pytest.mark.parametrize(
    "line",
    [
        "Server.target_qps = 3",
        "*.Server.target_qps 3",
        "*.Server.target_qps = fast",
        "x",
        "*.Server.target_qps = 3 # c",
        "*.Server.target_latency = 12.5",
        "*.Server.min_query_count = 1e3",
        "*.Server.min_duration = 010",
        "*.Server.min_duration = -5",
    ],
)
def test_a_line_that_is_no_setting_is_named(line: str, tmp_path: Path) -> None:
    conf = tmp_path / "user.conf"
    conf.write_text(f"\n# fine\n{line}\n")
    with pytest.raises(MeasurementError, match=r"line 3 is no setting"):
        check_user_conf(conf)


def test_what_is_accepted_is_what_loadgen_reads(tmp_path: Path) -> None:
    conf = tmp_path / "user.conf"
    conf.write_text("*.Server.target_qps = 1.5e2\n*.*.target_latency_percentile = 97.5\n*.Server.min_duration = 10\n")
    settings = loadgen_settings("Server", "m", {}, conf)
    assert (settings.server_target_qps, settings.server_target_latency_percentile) == (150.0, 0.975)
    assert settings.min_duration_ms == 10


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match="cannot read"):
        loadgen_settings("Offline", "m", {}, tmp_path / "none.conf")


def test_without_loadgen_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlperf_loadgen", None)
    with pytest.raises(MeasurementError, match="run: pip install mlcommons-loadgen"):
        loadgen.library()
