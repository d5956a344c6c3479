"""The GPU benchmarks run dry: torch on the CPU is the device, and every figure is of a real run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hotcold.cli import main
from hotcold.errors import InputError, MismatchError, UnsupportedError
from hotcold.eval import agreement
from hotcold.eval.gpu import bench as gpu_bench
from hotcold.eval.gpu import kernel_bench
from hotcold.eval.gpu.bench import GpuSide, sides_of
from hotcold.eval.gpu.kernel_bench import KernelPlan, KernelRow, check_kernels
from hotcold.eval.peers.llama_cpp import LlamaCpp
from hotcold.eval.synthetic.shapes import Synthetic, write_synthetic
from hotcold.files.gguf import GGUFFile
from hotcold.identify import identify
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.gpu.device import open_device
from hotcold.runtime.triton import ops

TINY = ["--d-model", "64", "--d-ff", "96", "--device", "cpu", "-r", "3"]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """One layer of the smallest shape."""
    return write_synthetic(Synthetic("smollm2-135m", n_layers=1, quant="bf16"), tmp_path_factory.mktemp("s"))


def test_bench_kernels_prints_what_it_measured(capsys):
    assert main(["bench-kernels", *TINY, "-o", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["operator"] for row in report["rows"]] == ["s2", "s3", "ffn"]
    for row in report["rows"]:
        assert 0 < row["us_low"] <= row["us"] <= row["us_high"] and row["dense_us"] > 0
    active = round(96 * 0.11)
    assert [row["bytes"] for row in report["rows"]] == [
        active * 64 * 2, active * 64 * 2, (96 + 2 * active) * 64 * 2,
    ]  # fmt: skip
    assert main(["bench-kernels", *TINY]) == 0
    assert "\n| s2 " in capsys.readouterr().out


def test_the_active_rows_of_all_copies_exceed_the_cache():
    """It is these that a sparse operator reads; the rest of a matrix never enters the cache."""
    plan = KernelPlan(64, 96, sparsity=0.9, rotated=40_000)
    inputs = kernel_bench._Inputs(plan, open_device("cpu"))
    assert len(inputs.ffns) * inputs.n_active * 64 * 2 > 40_000 >= 0.9 * len(inputs.ffns) * 10 * 64 * 2


def test_ratios():
    row = KernelRow("s2", us=10, us_low=9, us_high=11, dense_us=50, bytes=8e3, bandwidth=1e9)
    assert row.speedup == 5 and row.limit_us == pytest.approx(8) and row.over_limit == pytest.approx(1.25)


@pytest.mark.parametrize("sparsity", [0.0, 0.89, 1.0])
def test_the_check_runs_the_kernels_themselves(monkeypatch, sparsity):
    monkeypatch.setattr(kernel_bench, "operators", lambda device: ops)
    found = check_kernels(KernelPlan(48, 70, sparsity=sparsity, rotated=1), open_device("cpu"))
    assert set(found) == {"dot_rows", "s2", "s3", "ffn", "select"} and max(found.values()) < 1e-4


def test_the_check_finds_a_wrong_kernel(monkeypatch):
    class Wrong:
        def __getattr__(self, name):
            return getattr(ops, name)

        def s3(self, a, down):
            return ops.s3(a, down) * 1.01

    monkeypatch.setattr(kernel_bench, "operators", lambda device: Wrong())
    with pytest.raises(MismatchError, match="operator s3 disagrees with its reference"):
        check_kernels(KernelPlan(32, 32, rotated=1), open_device("cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "q4"], "unknown type"),
        (["--sparsity", "2"], "--sparsity out of range"),
        (["--shape", "gpt-9"], "unknown synthetic shape"),
    ],
)
def test_bench_kernels_errors(capsys, arguments, message):
    assert main(["bench-kernels", *TINY, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bench_gpu(synthetic, capsys, tmp_path):
    arguments = ["bench-gpu", "--synthetic", "smollm2-135m", "--layers", "1", "--device", "cpu", "-t", "1"]
    sizes = ["-r", "2", "-p", "3", "-n", "4", "--budgets", "900", "--cache", str(synthetic.parent)]
    arguments += ["-m", "predicted"]
    assert main([*arguments, *sizes, "-o", "json", "--save", str(tmp_path / "report.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert identify(tmp_path / "report.json").kind == "report"
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {"gpu predicted", "hybrid 900% predicted"}
    for row in rows.values():
        assert row["generation"]["median"] > 0 and row["bytes_per_token"] > 0
    hybrid = rows["hybrid 900% predicted"]
    told = hybrid["telemetry"]
    assert told["decoded"] == 8 and told["hot_fired"] + told["cold_fired"] > 0
    assert 0 < hybrid["planned_bytes"] <= hybrid["side"]["budget"]
    assert rows["gpu predicted"]["sparsity"] > 0.3


def test_a_side_that_cannot_run_costs_no_other_its_row(synthetic, capsys):
    arguments = ["bench-gpu", "--synthetic", "smollm2-135m", "--layers", "1", "--device", "cpu", "-t", "1"]
    arguments += ["-r", "2", "-p", "3", "-n", "4", "--cache", str(synthetic.parent), "-m", "exact"]
    assert main([*arguments, "--backends", "hybrid", "--budgets", "5,900", "-o", "json"]) == 0
    told = capsys.readouterr()
    little, much = json.loads(told.out)["rows"]
    assert "not enough GPU memory" in little["error"] and little["generation"] is None
    assert "hybrid 5% exact: not enough GPU memory" in told.err
    assert much["error"] is None and much["generation"]["median"] > 0
    assert main([*arguments, "--backends", "hybrid", "--budgets", "5,900"]) == 0
    table = capsys.readouterr().out
    assert (
        "| hybrid 5% exact | – | – |" in " ".join(table.split())
        and "\nhybrid 5% exact: not enough GPU memory" in table
    )
    assert main([*arguments, "--backends", "hybrid", "--budgets", "5"]) == 2
    assert "error: not enough GPU memory" in capsys.readouterr().err


def test_bench_gpu_with_accelerate(synthetic, capsys):
    arguments = ["bench-gpu", "--synthetic", "smollm2-135m", "--layers", "1", "--device", "cpu", "-t", "1"]
    sizes = ["-r", "2", "-p", "3", "-n", "4", "--budgets", "50,900", "--cache", str(synthetic.parent)]
    assert main([*arguments, *sizes, "--backends", "accelerate", "-o", "json"]) == 0
    little, much = json.loads(capsys.readouterr().out)["rows"]
    assert (little["name"], much["name"]) == ("accelerate 50%", "accelerate 900%")
    assert little["generation"]["median"] > 0 and little["prompt"]["median"] > 0
    assert little["planned_bytes"] == 0  # no room beside that for the embedding, the largest layer
    weights = sum(t.data.nbytes for t in GGUFFile(file_of_role(synthetic, "dense")).tensors.values())
    assert much["planned_bytes"] == pytest.approx(weights, rel=0.01)


def test_sides(synthetic):
    sides = sides_of(synthetic, ["hybrid", "accelerate", "llama.cpp"], ["exact"], [0.5])
    assert [side.name for side in sides] == ["llama.cpp 50%", "accelerate 50%", "hybrid 50% exact"]
    assert sides[0].budget == sides[1].budget == sides[2].budget > 1 << 20
    assert GpuSide("gpu", "dense").name == "gpu dense"
    with pytest.raises(InputError, match="unknown backend"):
        sides_of(synthetic, ["tpu"], ["exact"], [0.5])


@pytest.mark.parametrize("n_on_device", [0, 1, 3])
def test_llama_cpp_gets_the_layers_that_our_plan_has_on_the_device(synthetic, monkeypatch, n_on_device):
    """It counts the output layer as one of them; our plans have it on the device always."""
    layers = [SimpleNamespace(on_device=n < n_on_device) for n in range(3)]
    monkeypatch.setattr(gpu_bench, "make_placement", lambda *_: SimpleNamespace(layers=layers))
    monkeypatch.setattr(gpu_bench, "LlamaCpp", lambda path, **asked: asked["n_gpu_layers"])
    side = GpuSide("llama.cpp", "", 1 << 30)
    assert gpu_bench._llama_cpp(synthetic, side, "cpu", 1, 8) == n_on_device + 1


def test_llama_cpp_without_a_gpu_says_so(synthetic):
    pytest.importorskip("llama_cpp")
    with pytest.raises(UnsupportedError, match="built without GPU support"):
        LlamaCpp(next(synthetic.glob("*.gguf")), n_threads=1, n_gpu_layers=3)


def test_the_device_says_what_the_cpu_engine_says(synthetic, capsys):
    arguments = ["bench-gpu", "--synthetic", "smollm2-135m", "--layers", "1", "--device", "cpu", "-t", "1"]
    arguments += ["--cache", str(synthetic.parent), "-m", "predicted", "--backends", "gpu,accelerate"]
    assert main([*arguments, "--check", "-p", "3", "-n", "6", "-o", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["name"] == "gpu predicted" and row["tokens"] == 6 and row["worst_error"] < 0.1
    assert row["alike"] == 6 or row["lead"] < 5  # a near tie


def test_agreement_finds_the_first_difference():
    logits = np.array([[0, 3, 1], [5, 0, 4.8], [0, 0, 2]], np.float64)
    got = logits + np.array([[0, 0, 0], [0, 0, 0.6], [0, 0.1, 0]])
    found = agreement._compared("side", [1, 0, 2], logits, got)
    assert (found.alike, found.first_difference) == (2, 1)
    assert found.lead == pytest.approx(0.2 / np.sqrt(0.6**2 / 3))
    *_, last = agreement.as_table([found]).splitlines()
    assert last.replace("|", " ").split() == ["side", "2/3", "1", "0.58", "8.7e-02"]
