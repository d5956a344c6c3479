"""`hotcold convert`: every way between the formats, through the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from hotcold.cli import main
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.convert.conversions import FORMATS, format_of
from hotcold.convert.convert_command import _TARGETS
from hotcold.convert.powerinfer.gpu_index import GpuIndex
from hotcold.files.gguf import GGUFFile
from hotcold.files.quantize import dequantize
from hotcold.files.safetensors import SafetensorsFile
from hotcold.model.checkpoint import fingerprint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.predictor.bundle import PredictorBundle

D_FF, N_LAYERS = 160, 3


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    return make_model("relu")


@pytest.fixture(scope="module", params=["f16", "q4_0"])
def bundle(request, model, make_predictors, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "bundle"
    export_bundle(
        HFCheckpoint(model), out, name="m", fingerprint=fingerprint(str(model)), folder=model,
        predictors=PredictorBundle.load(make_predictors(model)),
        options=ExportOptions(request.param, predictor_quant="f32"),
    )  # fmt: skip
    return out


@pytest.fixture
def convert(tmp_path, capsys):
    """convert("gguf", sources...) -> what was written; with `error` the one line of an error."""

    def run(to: str, *sources: Path, error: bool = False, options: tuple[str, ...] = ()) -> Path | str:
        out = tmp_path / f"{to}-{len(list(tmp_path.iterdir()))}"
        capsys.readouterr()
        status = main(["convert", *map(str, sources), "--to", to, "--out", str(out), *options])
        captured = capsys.readouterr()
        if error:
            assert status == 2 and not out.exists() and captured.err.count("\n") == 1, captured.err
            return captured.err
        assert status == 0, captured.err
        assert captured.out == f"{out}\n"
        return out

    return run


def same_tensors(one: Path, other: Path) -> None:
    first, second = GGUFFile(one), GGUFFile(other)
    assert first.magic == second.magic and set(first.tensors) == set(second.tensors)
    for name, tensor in first.tensors.items():
        twin = second.tensors[name]
        assert (tensor.type, tensor.shape) == (twin.type, twin.shape), name
        assert tensor.data.tobytes() == twin.data.tobytes(), name


def test_every_target_can_be_chosen_and_every_format_is_explained():
    from hotcold.convert import convert_command

    assert [name for name, entry in FORMATS.items() if entry.write] == _TARGETS
    assert all(f"\n  {name} " in convert_command.HELP for name in FORMATS)


def test_the_files_of_a_bundle_are_copied(bundle, convert):
    assert convert("gguf", bundle).read_bytes() == (bundle / "m.gguf").read_bytes()
    assert convert("powerinfer", bundle).read_bytes() == (bundle / "m.powerinfer.gguf").read_bytes()


def test_a_sparse_file_becomes_a_bundle_with_the_same_bytes(bundle, convert):
    """Decoding and quantizing again changes nothing, in F16 and in Q4_0; the tokenizer is the same too."""
    sparse = bundle / "m.powerinfer.gguf"
    again = convert("bundle", sparse, bundle / "predictors", options=("--name", "m"))
    assert verify_bundle(again) == []
    same_tensors(sparse, again / "m.powerinfer.gguf")
    ours, theirs = GGUFFile(again / "m.powerinfer.gguf").metadata, GGUFFile(sparse).metadata
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert np.array_equal(ours[key], value), key


def test_what_is_lost_of_hot_neurons_is_said(bundle, tmp_path, capsys):
    sparse, lost = (
        str(bundle / "m.powerinfer.gguf"),
        "lists hot neurons, but no firing frequencies",
    )
    assert main(["convert", sparse, "--to", "bundle", "--out", str(tmp_path / "a")]) == 0
    assert lost in capsys.readouterr().err
    predictors = str(bundle / "predictors")
    assert main(["convert", sparse, predictors, "--to", "bundle", "--out", str(tmp_path / "b")]) == 0
    assert lost not in capsys.readouterr().err


def test_attention_matrices_by_input_are_written_where_they_are_wished_and_kept(bundle, convert):
    assert not (convert("bundle", bundle) / "m.attention.gguf").exists()
    first = convert("bundle", bundle, options=("--attention-rows",))
    again = convert("bundle", first)
    assert verify_bundle(first) == verify_bundle(again) == []
    same_tensors(first / "m.attention.gguf", again / "m.attention.gguf")


def test_a_sparse_file_becomes_a_dense_one_but_for_the_transposed_matrix(bundle, convert):
    dense, expected = convert("gguf", bundle / "m.powerinfer.gguf"), GGUFFile(bundle / "m.gguf")
    exact = expected.tensors["blk.0.ffn_down_exps.weight"].type == "F16"
    tensors = GGUFFile(dense).tensors
    assert set(tensors) - {"output.weight"} == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        if exact or "down" not in name:
            assert tensors[name].data.tobytes() == tensor.data.tobytes(), name
        else:
            difference = dequantize(tensors[name]) - dequantize(tensor)
            assert 0 < np.linalg.norm(difference) < 0.15 * np.linalg.norm(dequantize(tensor))


def test_a_dense_file_with_predictors_becomes_a_sparse_one(bundle, convert):
    sparse = convert(
        "powerinfer", bundle / "m.gguf", bundle / "predictors", options=("--predictor-quant", "f32")
    )
    if GGUFFile(sparse).tensors["blk.0.ffn_up.weight"].type == "F16":
        same_tensors(sparse, bundle / "m.powerinfer.gguf")
    assert GGUFFile(sparse).metadata["hotcold.hot.counts"].tolist() == [80] * N_LAYERS


def test_a_checkpoint_and_predictors_become_what_export_writes(bundle, model, convert):
    kind = "q4_0" if GGUFFile(bundle / "m.gguf").tensors["token_embd.weight"].type == "Q4_0" else "f16"
    options = ("--quant", kind, "--predictor-quant", "f32", "--name", "m")
    sparse = convert("powerinfer", model, bundle / "predictors", options=options)
    assert sparse.read_bytes() == (bundle / "m.powerinfer.gguf").read_bytes()


def test_a_checkpoint_alone_becomes_a_sparse_file_for_exact_mode(bundle, model, convert, tmp_path, capsys):
    plain = convert("bundle", model, options=("--name", "m"))
    file = convert("powerinfer", plain)
    same_tensors(file, plain / "m.powerinfer.gguf")
    assert main(["convert", str(plain), "--to", "powerinfer", "--out", str(tmp_path / "again")]) == 0
    assert "PowerInfer cannot run it" in capsys.readouterr().err
    assert main(["verify", str(convert("bundle", file))]) == 0


def test_predictors_out_of_a_sparse_file_and_through_model_pt(bundle, convert):
    own = PredictorBundle.load(bundle / "predictors")
    found = PredictorBundle.load(convert("predictors", bundle / "m.powerinfer.gguf"))
    assert found.thresholds == own.thresholds and found.model_fingerprint == own.model_fingerprint
    files = convert("model-pt", bundle)
    activation = convert("activation", bundle)
    again = PredictorBundle.load(convert("predictors", files, activation, options=("--allow-pickle",)))
    assert again.config() == own.config()
    for layers in zip(own.layers, again.layers, found.layers, strict=True):
        for array in ("fc1", "fc2"):
            first, *others = (getattr(layer, array) for layer in layers)
            assert all(np.array_equal(first, other) for other in others)
        np.testing.assert_array_equal(layers[1].firing_frequency, layers[0].firing_frequency)
        assert layers[2].firing_frequency is None


def test_gpu_index_from_a_bundle_and_back_to_activation(bundle, convert):
    row = sum(GGUFFile(bundle / "m.powerinfer.gguf").tensors[f"blk.0.{name}.weight"].data.nbytes for name in
              ("ffn_gate", "ffn_up", "ffn_down_t")) // D_FF  # fmt: skip
    budget = str(2 * D_FF * row / (1 << 30))
    index = convert("gpuidx", bundle, options=("--vram-budget", budget))
    read = GpuIndex.read(GGUFFile(index))
    assert [len(bucket) for bucket in read.buckets] == [
        160,
        160,
        0,
    ]  # the first of equal layers
    again = convert("gpuidx", index)
    assert again.read_bytes() == index.read_bytes()
    smaller = str(D_FF * row / (1 << 30))
    options = ("--allow-pickle", "--vram-budget", smaller)
    halved = convert("gpuidx", bundle, convert("activation", index), options=options)
    assert [len(bucket) for bucket in GpuIndex.read(GGUFFile(halved)).buckets] == [160, 0, 0]


def test_traces_are_counted(tmp_path, convert, model):
    """Against counts made here, of real traces of a real model."""
    from hotcold.predictor.traces.reader import Traces

    traces = tmp_path / "traces"
    arguments = ["collect-traces", "--model", str(model), "--text", "stdlib", "--tokens", "300"]
    assert main([*arguments, "--out", str(traces)]) == 0
    activation = convert("activation", traces)
    opened = Traces(traces)
    for layer in range(N_LAYERS):
        packed = opened.layer(layer)[1]
        counts = np.unpackbits(packed, axis=1, bitorder="little")[:, :D_FF].sum(axis=0)
        file = activation / f"activation_{layer}.pt"
        vector = torch.load(file, weights_only=True)  # noqa: TID251 - the oracle
        assert counts.sum() > 0 and vector.tolist() == counts.tolist()


def test_formats_are_told_by_what_lies_there(bundle, model, convert, tmp_path):
    paths = {
        "bundle": bundle, "powerinfer": bundle / "m.powerinfer.gguf", "gguf": bundle / "m.gguf",
        "predictors": bundle / "predictors", "checkpoint": model, "model-pt": convert("model-pt", bundle),
    }  # fmt: skip
    assert {name: format_of(path) for name, path in paths.items()} == {name: name for name in paths}


@pytest.fixture(scope="module")
def other(make_model) -> Path:
    return make_model("relu", seed=1)


def test_errors_are_one_line(bundle, model, make_model, other, convert, tmp_path):
    files = convert("model-pt", bundle)
    assert "a pickle, which can run code" in convert("predictors", files, error=True)
    assert "no source has predictors" in convert("model-pt", model, error=True)
    silu = make_model("silu")
    assert "is never zero, so no sparse file can be written (got silu" in convert(
        "powerinfer", silu, error=True
    )
    assert "no source has a model" in convert("gguf", bundle / "predictors", error=True)
    assert "no source has firing statistics" in convert("activation", model, error=True)
    assert "set --vram-budget, in GiB" in convert("gpuidx", bundle, error=True)
    assert "the size of a neuron is unknown" in convert(
        "gpuidx", model, bundle / "predictors", error=True, options=("--vram-budget", "1")
    )
    assert "unknown format" in convert("gguf", tmp_path, error=True)
    assert "unknown format" in convert("gguf", tmp_path / "nothing", error=True)
    assert "--counted-tokens: must be above 0" in convert(
        "gguf", bundle, error=True, options=("--counted-tokens", "0")
    )
    assert "predictors of another model" in convert(
        "predictors", other, files, error=True, options=("--allow-pickle",)
    )
    assert "predictors of another model" in convert("powerinfer", other, bundle / "predictors", error=True)


def test_a_foreign_predictor_takes_the_model_it_is_given_with(model, convert, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for layer in range(N_LAYERS):
        torch.manual_seed(layer)
        pair = {
            "fc1.weight": torch.randn(10 + layer, 64).half(),
            "fc2.weight": torch.randn(D_FF, 10 + layer).half(),
        }
        torch.save(pair, folder / f"model_{layer}.pt")
    assert "do not name their model" in convert("predictors", folder, error=True, options=("--allow-pickle",))
    bundle = convert("bundle", folder, model, options=("--allow-pickle", "--quant", "q4_0"))
    assert verify_bundle(bundle) == []
    tensors = GGUFFile(next(bundle.glob("*.powerinfer.gguf"))).tensors
    assert [tensors[f"blk.{n}.fc1.weight"].shape for n in range(N_LAYERS)] == [(10, 64), (11, 64), (12, 64)]
    assert [tensors[f"blk.{n}.fc2.weight"].type for n in range(N_LAYERS)] == ["F16"] * N_LAYERS


def test_safetensors_stay_readable_while_they_are_replaced(tmp_path):
    """A bundle can be written over the one that it is made from: mapped files outlive their names."""
    save_file({"a": np.arange(4, dtype=np.float32)}, tmp_path / "f")
    mapped = SafetensorsFile(tmp_path / "f").floats("a", (4,))
    (tmp_path / "f").unlink()
    assert mapped.tolist() == [0, 1, 2, 3]
