"""From options to engines and plans, with torch on the CPU as the device."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from hotcold.cli import main
from hotcold.convert.powerinfer.gpu_index import GpuIndex
from hotcold.errors import FormatError, InputError, MismatchError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.runtime.backends import BackendOptions, make_placement, open_engine
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.gpu.device import open_device, parse_budgets
from hotcold.runtime.placement.file import gpuidx_path, load_placement, save_placement
from hotcold.runtime.placement.plan import Costs, PlacedLayer, Placement
from hotcold.runtime.placement.problem import make_problem

IDS = [5, 9, 40, 77]


@pytest.fixture
def sized(bundle, tmp_path):
    """A copy of the bundle that knows how often its neurons fire: the higher the index, the more often."""
    path = tmp_path / "tiny"
    shutil.copytree(bundle.path, path)
    frequency = np.linspace(0, 1, 96, dtype=np.float32)
    layers = [LayerPredictor(fc1, fc2, 0.0, frequency) for fc1, fc2 in bundle.predictors]
    (path / "predictors").mkdir(exist_ok=True)
    PredictorBundle("0" * 64, layers, 0.9, {}).write_files(path / "predictors")
    return path


def options(budget: str = "auto", **more: object) -> BackendOptions:
    return BackendOptions("hybrid", device="cpu", vram_budget=budget, **more)


def needed(path, mode: str) -> int:
    """Bytes for all of the model, by a plan with room to spare."""
    return make_placement(path, mode, 1, 64, options("256M")).device_bytes


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
@pytest.mark.parametrize("backend", ["gpu", "hybrid"])
def test_every_backend_says_the_same(sized, backend, mode):
    engine = open_engine(sized, mode, 1, 64, BackendOptions(backend, device="cpu"))
    expected = Engine.load(sized, mode, 1).prefill(IDS)
    assert np.allclose(engine.prefill(IDS), expected, atol=1e-3)
    assert engine.mode == mode


def test_a_tight_budget_keeps_the_most_frequent(sized):
    budget = needed(sized, "exact") - 60 * 3 * 64 * 4
    plan = make_placement(sized, "exact", 1, 64, options(f"{budget}B"))
    assert plan.device_bytes <= budget
    assert sum(len(layer.hot) for layer in plan.layers) <= 2 * 96 - 60
    for layer in plan.layers:
        if 0 < len(layer.hot) < 96:
            assert layer.hot.min() == 96 - len(layer.hot)


def test_plans_are_saved_and_used_again(sized):
    budget = needed(sized, "predicted") - 60 * 3 * 64 * 4
    engine = open_engine(sized, "predicted", 1, 64, options(f"{budget}B"))
    [saved] = sized.parent.glob("*.placement.json")
    again = open_engine(sized, "predicted", 1, 64, options(place=str(saved)))
    assert np.array_equal(engine.prefill(IDS), again.prefill(IDS))
    index = GpuIndex.read(GGUFFile(gpuidx_path(saved)))
    for layer, bucket in zip(engine.placement.layers, index.buckets, strict=True):
        assert np.array_equal(layer.hot, bucket)
    by_index = make_placement(sized, "predicted", 1, 64, options(place=str(gpuidx_path(saved))))
    assert all(
        np.array_equal(a.hot, b.hot) for a, b in zip(by_index.layers, engine.placement.layers, strict=True)
    )


def test_without_frequencies_it_says_so(bundle, capsys):
    make_placement(bundle.path, "exact", 1, 64, options())
    assert "firing frequencies are unknown" in capsys.readouterr().err


def test_firing_counts_of_another_model(sized, tmp_path):
    with pytest.raises(InputError, match="no firing frequencies found"):
        make_placement(sized, "exact", 1, 64, options(firing=str(tmp_path)))


def test_dry_run_prints_the_plan_and_loads_nothing(sized, capsys, monkeypatch):
    monkeypatch.setattr("hotcold.runtime.gpu.hybrid.HybridEngine.load", None)
    arguments = ["run", str(sized), "--backend", "hybrid", "--device", "cpu", "--dry-run", "-c", "64"]
    assert main([*arguments, "--vram-budget", "100M", "--mode", "exact"]) == 0
    printed = capsys.readouterr().out
    assert "hit rate" in printed and "tokens/s expected" in printed
    assert len(printed.splitlines()) == 1 + 2 + 2


def test_exact_is_planned_with_all_gates(sized):
    """A third of what neurons hold is read on every token, whatever fires."""
    file, costs = GGUFFile(file_of_role(sized, "sparse")), Costs(1e9, 1e8, 1e-5, 2e-6)
    problems = [
        make_problem(file, [np.zeros(96)] * 2, mode=mode, n_ctx=64, budgets=[1 << 32], costs=costs)
        for mode in ("exact", "predicted")
    ]
    assert [of.layers[0].always_read for of in problems] == [pytest.approx(1 / 3), 0.0]


def test_dry_run_on_two_devices(sized, capsys):
    """What one device would have to take and cannot, two do."""
    plan = make_placement(sized, "exact", 1, 64, options("256M"))
    layer, fixed = plan.layers[0].device_bytes, plan.fixed[0]
    budgets = f"{fixed + layer}B,{fixed + layer}B"
    arguments = ["run", str(sized), "--backend", "hybrid", "--device", "cpu,cpu", "--dry-run", "-c", "64"]
    assert main([*arguments, "--vram-budget", budgets, "--mode", "exact"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "device 0" in lines[1] and "device 1" in lines[2] and len(lines) == 1 + 2 + 3
    assert lines[3].startswith("device 0: ") and lines[4].startswith("device 1: ")


def test_run_on_two_devices(sized, capsys):
    plan = make_placement(sized, "exact", 1, 64, options("256M"))
    layer = plan.layers[0].device_bytes + plan.layers[0].cpu_bytes
    budget = f"{plan.fixed[0] + 3 * layer // 2}B"
    arguments = ["run", str(sized), "-p", "fox", "-n", "4", "--ignore-eos", "--temp", "0", "-c", "64"]
    assert main([*arguments, "--mode", "exact"]) == 0
    expected = capsys.readouterr().out
    for backend in ("gpu", "hybrid"):
        devices = ["--backend", backend, "--device", "cpu,cpu", "--vram-budget", budget]
        assert main([*arguments, "--mode", "exact", *devices]) == 0
        assert capsys.readouterr().out == expected
    [saved] = sized.parent.glob("*+*MiB.placement.json")
    assert [layer.device for layer in load_placement(saved, 2, 96).layers] == [0, 1]


def test_run_reports_the_telemetry(sized, capsys):
    arguments = ["run", str(sized), "-p", "fox", "-n", "4", "--ignore-eos", "--temp", "0", "-c", "64"]
    assert main([*arguments, "--mode", "predicted", "--backend", "hybrid", "--device", "cpu"]) == 0
    hybrid = capsys.readouterr()
    assert "of firing neurons were hot" in hybrid.err and "per token:" in hybrid.err
    assert main([*arguments, "--mode", "predicted"]) == 0
    assert capsys.readouterr().out == hybrid.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run"], "--dry-run requires the hybrid backend; add --backend hybrid"),
        ([], "no prompt; give -p TEXT or -f FILE"),
        (
            ["-p", "a", "--backend", "hybrid", "--device", "cpu", "--vram-budget", "1M"],
            "not enough GPU memory",
        ),
        (["-p", "a", "--backend", "hybrid", "--device", "cpu", "--vram-budget", "x"], "not a size in bytes"),
        (
            ["-p", "a", "--backend", "hybrid", "--device", "cpu", "--vram-budget", "9999T"],
            "exceeds the free memory",
        ),
        (
            ["-p", "a", "--backend", "hybrid", "--device", "cpu", "--place", "no.json"],
            "no.json: no such plan",
        ),
        (["-p", "a", "--backend", "gpu", "--device", "quux"], "unknown device"),
        (["-p", "a", "--backend", "gpu", "--device", "cpu", "--vram-budget", "1M"], "not enough GPU memory"),
        (
            ["-p", "a", "--backend", "hybrid", "--device", "cpu,cpu", "--vram-budget", "1G,1G,1G"],
            "--vram-budget does not match the number of devices (got 1G,1G,1G, expected one size, or 2)",
        ),
    ],
)
def test_errors_are_one_line(sized, capsys, arguments, message):
    assert main(["run", str(sized), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]


PLAN = Placement(
    (PlacedLayer(True, np.array([1, 4], np.int32), 8), PlacedLayer(False, np.empty(0, np.int32), 8)), (100,)
)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    save_placement(PLAN, tmp_path / "plan.json", "f" * 64)
    read = load_placement(tmp_path / "plan.json", 2, 8, "f" * 64)
    assert [layer.hot.tolist() for layer in read.layers] == [[1, 4], []]
    assert [layer.on_device for layer in read.layers] == [True, False] and read.budgets == (100,)
    assert read.fixed == (0,) and read.spans == [(0, range(1))]
    with pytest.raises(
        MismatchError, match=rf"another model: the fingerprint differs \(got {'f' * 64}, expected eee"
    ):
        load_placement(tmp_path / "plan.json", 2, 8, "e" * 64)
    with pytest.raises(MismatchError, match=r"another model: .* \(got \(2, 8\), expected \(3, 8\)\)"):
        load_placement(tmp_path / "plan.json", 3, 8)


def test_a_plan_for_several_devices(tmp_path):
    layers = [PlacedLayer(True, np.array([i], np.int32), 8, device=i) for i in range(2)]
    save_placement(Placement((*layers, PLAN.layers[1]), (100, 50), (20, 10)), tmp_path / "plan.json")
    read = load_placement(tmp_path / "plan.json", 3, 8)
    assert read.budgets == (100, 50) and read.fixed == (20, 10)
    assert read.spans == [(0, range(1)), (1, range(1, 2))]


def test_a_plan_from_before_there_were_several_devices(tmp_path):
    save_placement(PLAN, tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    del plan["budgets"], plan["fixed"]
    for layer in plan["layers"]:
        del layer["device"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    read = load_placement(tmp_path / "plan.json", 2, 8)
    assert read.budgets == (100,) and read.fixed == (0,) and read.spans == [(0, range(1))]


ON_SECOND = {"on_device": True, "device": 1, "hot": [1], "hit_rate": 1, "device_bytes": 1, "cpu_bytes": 1}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", [ON_SECOND], "layers must be assigned to devices in order"),
        ("budgets", [], "there must be one size per device|layers must be assigned to devices"),
        ("budgets", 5, "a field is missing or has the wrong type"),
        ("fixed", [1, 2], "there must be one size per device"),
        ("format", "other", "not a plan of this version"),
        ("budget", "much", "a field is missing or has the wrong type"),
        ("layers", [{"on_device": True}], "a field is missing"),
        (
            "layers",
            [{"on_device": True, "hot": [4, 1], "hit_rate": 1, "device_bytes": 1, "cpu_bytes": 1}],
            "ascend",
        ),
        (
            "layers",
            [{"on_device": True, "hot": [8], "hit_rate": 1, "device_bytes": 1, "cpu_bytes": 1}],
            "ascend",
        ),
    ],
)
def test_broken_plans(tmp_path, field, value, message):
    save_placement(PLAN, tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text()) | {field: value}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(FormatError, match=message):
        load_placement(tmp_path / "plan.json", 2, 8)


def test_budgets():
    device = open_device("cpu")
    assert parse_budgets("1M", [device]) == [1 << 20]
    assert parse_budgets("auto", [device])[0] > 0
    with pytest.raises(UnsupportedError, match=r"cpu: --vram-budget exceeds the free memory"):
        parse_budgets("99999T", [device])
    with pytest.raises(InputError, match="unknown backend"):
        BackendOptions("tpu")
