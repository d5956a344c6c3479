"""PowerInfer's folders of `.pt` files, in and out, against PyTorch's own reader and files made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hotcold.convert.powerinfer.firing_counts import (
    firing_vectors,
    read_firing_counts,
    with_frequencies,
    write_firing_counts,
)
from hotcold.convert.powerinfer.model_pt import layer_pairs, read_model_pt, write_model_pt
from hotcold.errors import FormatError, InputError, MismatchError, ShapeError
from hotcold.files.safetensors import SafetensorsFile
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.predictor.training.metrics import LayerMetrics

FINGERPRINT = "5" * 64
RANKS, D_MODEL, D_FF = (3, 5), 8, 12


@pytest.fixture
def foreign(tmp_path) -> Path:
    """As the ProSparse team published theirs: float16, a rank per layer, one threshold."""
    folder = tmp_path / "x-Predictor"
    folder.mkdir()
    for number, rank in enumerate(RANKS):
        torch.manual_seed(number)
        pair = {"fc1.weight": torch.randn(rank, D_MODEL).half(), "fc2.weight": torch.randn(D_FF, rank).half()}
        torch.save(pair, folder / f"model_{number}.pt")
    (folder / "config.json").write_text('{"sparse_threshold": 0.25}')
    return folder


@pytest.fixture(scope="module")
def bundle() -> PredictorBundle:
    rng = np.random.default_rng(0)
    layers = [
        LayerPredictor(
            rng.standard_normal((rank, D_MODEL), np.float32), rng.standard_normal((D_FF, rank), np.float32),
            threshold, None, LayerMetrics(0.9, 0.5, 0.7, 0.8),
        )
        for rank, threshold in zip(RANKS, (0.5, -1.25), strict=True)
    ]  # fmt: skip
    return PredictorBundle(FINGERPRINT, layers, 0.9, {"model": "tiny"})


def arrays(bundle: PredictorBundle) -> list[bytes]:
    return [array.tobytes() for layer in bundle.layers for array in (layer.fc1, layer.fc2)]


def test_foreign_predictors_are_read(foreign):
    bundle = read_model_pt(foreign, FINGERPRINT, pickles_allowed=True)
    assert (bundle.ranks, bundle.d_model, bundle.d_ff) == ([3, 5], D_MODEL, D_FF)
    assert bundle.thresholds == [0.25, 0.25] and bundle.model_fingerprint == FINGERPRINT
    for number, layer in enumerate(bundle.layers):
        expected = torch.load(foreign / f"model_{number}.pt", weights_only=True)  # noqa: TID251 - the oracle
        np.testing.assert_array_equal(layer.fc1, expected["fc1.weight"].float())
        np.testing.assert_array_equal(layer.fc2, expected["fc2.weight"].float())
        assert layer.metrics is None and layer.firing_frequency is None
    with pytest.raises(InputError, match="do not name their model"):
        read_model_pt(foreign, pickles_allowed=True)


def test_what_is_written_is_what_powerinfers_converter_takes(bundle, tmp_path):
    """A plain dictionary of two contiguous float tensors in a zip file (convert.py's lazy unpickler)."""
    write_model_pt(bundle, tmp_path / "out")
    names = ["config.json", "hotcold.json", "model_0.pt", "model_1.pt"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sparse_threshold"] == -1.25
    for number, layer in enumerate(bundle.layers):
        file = tmp_path / "out" / f"model_{number}.pt"
        assert file.read_bytes()[:2] == b"PK"
        pair = torch.load(file, weights_only=True)  # noqa: TID251 - the oracle
        assert type(pair) is dict and list(pair) == ["fc1.weight", "fc2.weight"]
        for tensor, array in zip(pair.values(), (layer.fc1, layer.fc2), strict=True):
            assert type(tensor) is torch.Tensor and tensor.is_contiguous() and not tensor.requires_grad
            np.testing.assert_array_equal(tensor, array)


def test_out_and_back_is_the_same(bundle, tmp_path):
    write_model_pt(bundle, tmp_path / "out")
    again = read_model_pt(tmp_path / "out", pickles_allowed=True)
    assert again.config() == bundle.config() and arrays(again) == arrays(bundle)
    with pytest.raises(MismatchError, match="predictors of another model"):
        read_model_pt(tmp_path / "out", "6" * 64, pickles_allowed=True)


def tensors(path: Path, values: dict[str, torch.Tensor]) -> SafetensorsFile:
    """As the sandbox hands them on."""
    save_file(values, path)
    return SafetensorsFile(path)


FC1, FC2 = torch.ones(5, D_MODEL), torch.ones(D_FF, 5)
BROKEN = {
    "bias": ((FC1, FC2, torch.ones(D_FF)), FormatError, "model_1.pt, keys: wrong tensors"),
    "vector": ((FC1, torch.ones(5)), ShapeError, "model_1.pt: fc1.weight, fc2"),
    "ranks": ((FC1[:4].clone(), FC2), ShapeError, r"got \(4, 8\), \(12, 5\)"),
    "empty": ((torch.ones(0, D_MODEL), torch.ones(D_FF, 0)), ShapeError, r"got \(0, 8\)"),
    "width": ((torch.ones(5, 7), FC2), ShapeError, r"got \(7, 12\), expected \(8, 12\)"),
    "infinite": ((FC1 / 0, FC2), FormatError, "model_1.pt, weights: not all finite"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_are_no_predictor_name_file_and_field(tmp_path, name):
    values, error, message = BROKEN[name]
    good = tensors(tmp_path / "0", {"fc1.weight": FC1, "fc2.weight": FC2})
    odd = tensors(tmp_path / "1", dict(zip(("fc1.weight", "fc2.weight", "fc2.bias"), values, strict=False)))
    with pytest.raises(error, match=message):
        layer_pairs([good, odd], tmp_path)


def config(**values: object):
    return lambda folder: (folder / "config.json").write_text(json.dumps(values))


FOLDERS = {
    "gap": (lambda f: (f / "model_1.pt").rename(f / "model_2.pt"), FormatError, "model_1.pt: missing"),
    "none": (lambda f: [p.unlink() for p in f.glob("*.pt")], InputError, "expected model_0.pt"),
    "threshold": (config(sparse_threshold="low"), FormatError, "sparse_threshold: not a number"),
    "no json": (lambda f: (f / "config.json").write_text("{"), FormatError, "config.json"),
    "ours": (config(hotcold=[]), FormatError, "hotcold: not an object"),
    "ours, empty": (config(hotcold={}), FormatError, "format: not of this format"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_broken_folders_name_file_and_field(foreign, name):
    edit, error, message = FOLDERS[name]
    edit(foreign)
    with pytest.raises(error, match=message):
        read_model_pt(foreign, FINGERPRINT, pickles_allowed=True)


def test_hotcolds_part_of_other_predictors_is_refused(foreign, bundle):
    other = bundle.config() | {"ranks": [3, 4]}
    (foreign / "config.json").write_text(json.dumps({"hotcold": other}))
    with pytest.raises(MismatchError, match="metadata belongs to other files"):
        read_model_pt(foreign, FINGERPRINT, pickles_allowed=True)


def test_activation_files_are_bare_vectors(tmp_path):
    write_firing_counts([np.zeros(3), np.array([0.25, 1, 0], np.float32)], tmp_path / "activation")
    vector = torch.load(tmp_path / "activation" / "activation_1.pt", weights_only=True)  # noqa: TID251 - the oracle
    assert vector.dtype == torch.float32 and vector.tolist() == [0.25, 1, 0]


def test_more_than_ten_layers_stay_in_the_order_of_their_numbers(tmp_path):
    for number in range(12):
        torch.save(torch.tensor([number, 1]), tmp_path / f"activation_{number}.pt")  # int64 counts
    assert [v[0] for v in read_firing_counts(tmp_path, pickles_allowed=True)] == list(range(12))


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"tensor": torch.ones(2, 2)}, FormatError, "activation_1.pt, tensor: not a single vector"),
        ({"a": torch.ones(2)}, FormatError, "activation_1.pt, tensor: not a single vector"),
        ({"tensor": -torch.ones(2)}, FormatError, "firing counts must be >= 0"),
        ({"tensor": torch.ones(2) / 0}, FormatError, "firing counts must be >= 0"),
        ({"tensor": torch.ones(3)}, ShapeError, "activation_1.pt: d_ff differs from layer 0"),
    ],
)
def test_broken_activation_files(tmp_path, values, error, message):
    files = [tensors(tmp_path / "0", {"tensor": torch.ones(2)}), tensors(tmp_path / "1", values)]
    with pytest.raises(error, match=message):
        firing_vectors(files, tmp_path)


def test_counts_become_frequencies_of_known_numbers_of_tokens(bundle):
    counts = [np.arange(D_FF, dtype=np.float32)] * 2
    layers = with_frequencies(bundle, counts, 20).layers
    np.testing.assert_allclose(layers[1].firing_frequency, np.arange(D_FF) / 20, rtol=1e-6)
    shares = with_frequencies(bundle, [counts[0] / 20] * 2, None)
    np.testing.assert_allclose(shares.layers[0].firing_frequency, np.arange(D_FF) / 20, rtol=1e-6)
    with pytest.raises(InputError, match=r"counts, not shares.*--counted-tokens"):
        with_frequencies(bundle, counts, None)
    with pytest.raises(InputError, match="fired more often than there are tokens"):
        with_frequencies(bundle, counts, 10)
    with pytest.raises(ShapeError, match=r"got \(1, 12\), expected \(2, 12\)"):
        with_frequencies(bundle, counts[:1], 20)
