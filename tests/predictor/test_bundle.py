"""The predictor bundle: what is saved is what is loaded, and broken folders are named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import handmade
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hotcold.errors import FormatError, HotcoldError, InputError
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.predictor.kinds.table import KINDS
from hotcold.predictor.training.metrics import LayerMetrics


def _bundle() -> PredictorBundle:
    rng = np.random.default_rng(0)
    layers = [
        LayerPredictor(
            fc1=rng.normal(size=(rank, 16)).astype(np.float32),
            fc2=rng.normal(size=(24, rank)).astype(np.float32),
            firing_frequency=rng.random(24, dtype=np.float32),
            threshold=float(np.float32(0.1 * rank)),
            metrics=LayerMetrics(0.95, 0.5, 0.25, 0.625),
        )
        for rank in (32, 64)
    ]
    return PredictorBundle("a" * 64, layers, 0.95, {"model": "tiny", "text": "stdlib"})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    _bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_round_trip(saved: Path) -> None:
    before, after = _bundle(), PredictorBundle.load(saved)
    assert after.config() == before.config()
    assert (after.n_layers, after.d_model, after.d_ff, after.ranks) == (2, 16, 24, [32, 64])
    for one, other in zip(before.layers, after.layers, strict=True):
        for name in ("fc1", "fc2", "firing_frequency"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_a_bundle_of_before_there_were_three_parts_is_read_and_says_what_its_metrics_are(
    tmp_path: Path,
) -> None:
    bundle = _bundle()
    bundle.training.update(train_tokens=38_000, heldout_tokens=2000)
    bundle.save(tmp_path / "old")
    again = PredictorBundle.load(tmp_path / "old")
    assert again.config() == bundle.config()
    assert (
        "threshold and metrics from 2000 tokens of other documents"
        in (tmp_path / "old/README.md").read_text()
    )


def test_version_1_is_the_kind_that_there_was(tmp_path: Path) -> None:
    """A bundle as versions before wrote it, made by hand; saved again it is of version 2, and the same."""
    handmade.predictors(tmp_path)
    old = PredictorBundle.load(tmp_path)
    assert old.kind is KINDS["lowrank-mlp"] and [layer.bias for layer in old.layers] == [None, None]
    x = np.array([[1.0, -2.0, 0.5, 3.0]], np.float32)
    fc1, fc2 = (
        np.frombuffer(handmade.predictor_tensors()[f"layers.0.{n}.weight"][2], "<f4") for n in ("fc1", "fc2")
    )
    expected = fc2.reshape(6, 2) @ np.maximum(fc1.reshape(2, 4) @ x[0], 0)
    np.testing.assert_allclose(old.layers[0].logits(x)[0], expected, rtol=1e-6)
    old.save(tmp_path / "new")
    config = json.loads((tmp_path / "new/config.json").read_text())
    before = json.loads((tmp_path / "config.json").read_text())
    assert config == before | {"version": 2, "kind": "lowrank-mlp", "training": {}}
    assert (
        load_file(tmp_path / "new/model.safetensors").keys()
        == load_file(tmp_path / "model.safetensors").keys()
    )


def test_version_2_names_its_kind(tmp_path: Path) -> None:
    handmade.svd_predictors(tmp_path)
    made = PredictorBundle.load(tmp_path)
    assert made.kind is KINDS["svd"]
    fc1, fc2, bias = (
        np.frombuffer(handmade.svd_tensors()[f"layers.1.{name}"][2], "<f4")
        for name in ("fc1.weight", "fc2.weight", "fc2.bias")
    )
    x = np.array([[1.0, -2.0, 0.5, 3.0], [-1.0, 2.0, -0.5, -3.0]], np.float32)
    expected = [fc2 * (fc1 @ token) + bias for token in x]
    np.testing.assert_allclose(made.layers[1].logits(x), expected, rtol=1e-6)
    made.save(tmp_path / "again")
    again = PredictorBundle.load(tmp_path / "again")
    assert again.config() == made.config() == json.loads((tmp_path / "config.json").read_text())
    for one, other in zip(made.layers, again.layers, strict=True):
        assert {n: a.tobytes() for n, a in one.tensors().items()} == {
            n: a.tobytes() for n, a in other.tensors().items()
        }


def test_the_files_are_those_of_the_contract(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["format"] == "hotcold-predictor" and config["ranks"] == [32, 64]
    assert config["metrics"][1] == {
        "recall": 0.95, "precision": 0.5, "predicted_sparsity": 0.25, "true_sparsity": 0.625,
    }  # fmt: skip
    tensors = load_file(saved / "model.safetensors")
    assert {name: value.shape for name, value in tensors.items() if name.startswith("layers.1.")} == {
        "layers.1.fc1.weight": (64, 16), "layers.1.fc2.weight": (24, 64), "layers.1.firing_frequency": (24,),
    }  # fmt: skip
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: hotcold\n") and "| mean | 48 |" in card


def test_saving_is_deterministic_and_replaces(saved: Path, tmp_path: Path, snapshot: Callable) -> None:
    before = snapshot(saved)
    PredictorBundle.from_pretrained(saved).save_pretrained(saved)
    assert snapshot(saved) == before


def test_logits_are_those_of_two_matrices() -> None:
    layer, x = _bundle().layers[0], np.random.default_rng(1).normal(size=(5, 16)).astype(np.float16)
    expected = [
        [sum(row * np.maximum(layer.fc1 @ token, 0)) for row in layer.fc2] for token in x.astype("f4")
    ]
    np.testing.assert_allclose(layer.logits(x), expected, rtol=1e-4, atol=1e-4)


def test_what_nobody_has_measured_stays_unknown(tmp_path: Path) -> None:
    """Predictors that others trained come without firing frequencies and metrics."""
    layers = [LayerPredictor(layer.fc1, layer.fc2, layer.threshold) for layer in _bundle().layers]
    PredictorBundle("a" * 64, layers, training={"converted_from": "x-Predictor"}).save(tmp_path / "p")
    loaded = PredictorBundle.load(tmp_path / "p")
    assert [(layer.firing_frequency, layer.metrics) for layer in loaded.layers] == [(None, None)] * 2
    assert loaded.metrics == [] and loaded.target_recall == 0
    card = (tmp_path / "p" / "README.md").read_text()
    assert "converted from x-Predictor" in card and "| 1 | 64 | 6.400 |" in card and "recall" not in card


def test_arrays_are_mapped_and_outlive_their_file(saved: Path) -> None:
    loaded = PredictorBundle.load(saved)
    assert not loaded.layers[0].fc1.flags.writeable and loaded.layers[0].fc1.base is not None
    PredictorBundle("b" * 64, [_bundle().layers[1]]).save(saved)
    np.testing.assert_array_equal(loaded.layers[0].fc1, _bundle().layers[0].fc1)


def test_from_pretrained_takes_the_hub_only_where_there_is_no_folder(saved: Path, monkeypatch) -> None:
    """The hub itself is out of reach: its client is asked for this repository's three files."""
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id: str, **options: object) -> str:
        asked.append((repo_id, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert PredictorBundle.from_pretrained(str(saved)).n_layers == 2 and not asked
    assert PredictorBundle.from_pretrained("org/predictors", revision="v1").ranks == [32, 64]
    files = ["config.json", "model.safetensors", "README.md"]
    assert asked == [("org/predictors", {"allow_patterns": files, "revision": "v1"})]


def test_a_name_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a local folder nor on the hub"):
        PredictorBundle.from_pretrained("no/such/repository")
    with pytest.raises(InputError, match="no predictors in this folder"):
        PredictorBundle.from_pretrained(tmp_path / "nothing")


def test_save_pretrained_uploads_if_asked(tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    calls = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, repo_id: str, **options: object) -> huggingface_hub.RepoUrl:
            calls.append((repo_id, options))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

        def upload_folder(
            self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str
        ) -> None:
            assert all((folder_path / name).is_file() for name in allow_patterns)
            calls.append((repo_id, sorted(allow_patterns)))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    _bundle().save_pretrained(tmp_path / "mine", push_to_hub=True, token="t", private=True)
    files = ["README.md", "config.json", "model.safetensors"]
    assert calls == ["t", ("mine", {"private": True, "exist_ok": True}), ("me/mine", files)]


def test_loads_without_torch(saved: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from hotcold.predictor.bundle import PredictorBundle\n"
        f"print(PredictorBundle.load({str(saved)!r}).n_layers)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "2\n"
    )


def _edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        values = {name: value for name, value in values.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(values))

    return edit


def _edit_tensor(name: str, value: np.ndarray | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(name)
        save_file(tensors if value is None else {**tensors, name: value}, folder / "model.safetensors")

    return edit


def _cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


NAN = float("nan")
FC1 = "layers.1.fc1.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), InputError, "no predictors in this folder"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), InputError, "no model.safetensors"),
    "config cut": (_cut("config.json", 40), FormatError, "config.json, content: is not JSON"),
    "other format": (_edit_config(format="hotcold-traces"), FormatError, "config.json, format: not of"),
    "version": (_edit_config(version=9), FormatError, "config.json, version: .*got 9, expected 1"),
    "no fingerprint": (_edit_config(model_fingerprint=...), FormatError, "model_fingerprint: wrong or miss"),
    "unknown": (_edit_config(bias=True), FormatError, "config.json, bias: .*no such field"),
    "no layers": (_edit_config(n_layers=0), FormatError, "n_layers: must be positive"),
    "short ranks": (_edit_config(ranks=[32]), FormatError, "ranks: wrong length .got 1, expected 2"),
    "text rank": (_edit_config(ranks=[32, "64"]), FormatError, r"ranks.1.: wrong type .got '64'"),
    "threshold of NaN": (_edit_config(thresholds=[0.5, NAN]), FormatError, r"thresholds.1.: not a number"),
    "int threshold": (_edit_config(thresholds=[0, 1]), FormatError, r"thresholds.0.: wrong type"),
    "bad metrics": (_edit_config(metrics=[{}, {}]), FormatError, r"metrics.0..recall: wrong or missing"),
    "other rank": (_edit_config(ranks=[32, 32]), FormatError, f"{FC1}: .*64, 16.*expected F32 .32, 16"),
    "cut tensors": (_cut("model.safetensors", 999), FormatError, "not a safetensors file"),
    "no fc1": (_edit_tensor(FC1, None), FormatError, f"model.safetensors, {FC1}: missing tensor"),
    "fc1 half": (_edit_tensor(FC1, np.zeros((64, 16), "f2")), FormatError, f"{FC1}: .*got F16"),
    "fc1 turned": (_edit_tensor(FC1, np.zeros((16, 64), "f4")), FormatError, f"{FC1}: .*16, 64"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_bundles_name_file_and_field(saved: Path, name: str) -> None:
    edit, error, message = BROKEN[name]
    edit(saved)
    with pytest.raises(error, match=message) as caught:
        PredictorBundle.load(saved)
    assert isinstance(caught.value, HotcoldError) and str(saved) in str(caught.value)
