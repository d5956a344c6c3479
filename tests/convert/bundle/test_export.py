"""A bundle is whole and says what is in it; parts that do not fit are refused before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from hotcold import storage
from hotcold.cli import main
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.errors import FormatError, InputError, MismatchError, ShapeError, StorageError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.files.quantize import QUANTS, dequantize
from hotcold.model.checkpoint import fingerprint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.predictor.bundle import PredictorBundle
from hotcold.runtime.generation.vocabulary import Vocabulary


@pytest.fixture
def model(make_model) -> Path:
    return make_model()


def export(model: Path, out: Path, predictors: Path | None = None, options: ExportOptions | None = None):
    return export_bundle(
        HFCheckpoint(model), out, name="m", fingerprint=fingerprint(str(model)), folder=model,
        predictors=None if predictors is None else PredictorBundle.load(predictors), options=options,
    )  # fmt: skip


def changed_config(model: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_attention_matrices_by_input_are_rounded_from_the_weights_themselves(model, tmp_path, capsys):
    arguments = ["export", "--model", str(model), "--out", str(tmp_path / "b"), "--name", "tiny"]
    assert main([*arguments, "--quant", "q8_0", "--attention-rows"]) == 0
    assert "attention" in capsys.readouterr().out
    assert verify_bundle(tmp_path / "b") == []
    file, source = GGUFFile(tmp_path / "b" / "tiny.attention.gguf"), HFCheckpoint(model)
    assert file.metadata["hotcold.model_fingerprint"] == fingerprint(str(model))
    assert len(file.tensors) == 4 * source.config["num_hidden_layers"]
    for slot, name in zip("qkvo", ("attn_q", "attn_k", "attn_v", "attn_output"), strict=True):
        weight = source.load(f"model.layers.1.self_attn.{slot}_proj.weight").T
        tensor = file.tensors[f"blk.1.{name}_t.weight"]
        expected = quants.quantize(np.ascontiguousarray(weight), GGMLQuantizationType.Q8_0)
        np.testing.assert_array_equal(tensor.data, expected.reshape(-1))


def test_the_command_writes_a_whole_bundle(model, make_predictors, tmp_path, capsys):
    predictors, out = make_predictors(model), tmp_path / "bundle"
    arguments = [
        "export",
        "--model",
        str(model),
        "--predictors",
        str(predictors),
        "--out",
        str(out),
        "--name",
        "tiny",
    ]
    assert main(arguments) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["name"]) == ("hotcold-bundle", 1, "tiny")
    assert (manifest["quant"], manifest["activation"]) == ("q4_0", "relu")
    assert manifest["model_fingerprint"] == fingerprint(str(model))
    assert {path: file["role"] for path, file in manifest["files"].items()} == {
        "tiny.gguf": "dense",
        "tiny.powerinfer.gguf": "sparse",
        "predictors/config.json": "predictor",
        "predictors/model.safetensors": "predictor",
        "predictors/README.md": "predictor",
        "tokenizer.json": "tokenizer",
        "tokenizer_config.json": "tokenizer",
        "generation_config.json": "tokenizer",
        "config.json": "config",
    }
    on_disk = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert on_disk == {*manifest["files"], "manifest.json"}
    for path, file in manifest["files"].items():
        assert file["sha256"] == storage.sha256_file(out / path)
        assert file["bytes"] == (out / path).stat().st_size
    size = manifest["files"]["tiny.gguf"]["bytes"]
    stdout = capsys.readouterr().out.splitlines()
    assert len(stdout) == len(manifest["files"])
    assert stdout[0].split() == [f"{size:,}", "bytes", "dense", str(out / "tiny.gguf")]


def test_the_same_input_gives_the_same_bytes(model, make_predictors, tmp_path):
    predictors = make_predictors(model)
    manifests = [export(model, tmp_path / name, predictors) for name in ("a", "b")]
    assert manifests[0] == manifests[1]


def test_types_follow_the_options(model, make_predictors, tmp_path):
    options = ExportOptions("q4_0", head_quant="q8_0", predictor_quant="f16")
    export(model, tmp_path / "b", make_predictors(model), options)
    types = {name: t.type for name, t in GGUFFile(tmp_path / "b" / "m.powerinfer.gguf").tensors.items()}
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q8_0", "Q8_0")
    assert (types["blk.0.fc1.weight"], types["blk.0.attn_q.weight"]) == ("F16", "Q4_0")
    assert GGUFFile(tmp_path / "b" / "m.gguf").tensors["token_embd.weight"].type == "Q8_0"


@pytest.mark.parametrize("quant", QUANTS)
def test_every_quantization_is_written_and_read(model, make_predictors, tmp_path, quant):
    export(model, tmp_path / "b", make_predictors(model), ExportOptions(quant, predictor_quant=quant))
    weight = HFCheckpoint(model).load("model.layers.1.mlp.down_proj.weight").T
    tensor = GGUFFile(tmp_path / "b" / "m.powerinfer.gguf").tensors["blk.1.ffn_down_t.weight"]
    assert tensor.type == QUANTS[quant]
    assert np.linalg.norm(dequantize(tensor) - weight) < 0.12 * np.linalg.norm(weight)


def test_rows_that_are_not_whole_blocks_become_f16_and_are_told(make_model, tmp_path, capsys):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "odd"
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=2,
        hidden_act="relu", tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(make_model() / "tokenizer.json", folder)
    export(folder, tmp_path / "b")
    assert GGUFFile(tmp_path / "b" / "m.gguf").tensors["blk.0.ffn_down_exps.weight"].type == "F16"
    assert (
        "ffn_down_exps: rows of 100 are not whole blocks of Q4_0, written as F16" in capsys.readouterr().err
    )


def test_without_predictors_the_form_by_neurons_has_none(model, make_predictors, tmp_path, capsys):
    manifest = export(model, tmp_path / "b")
    roles = {path: file["role"] for path, file in manifest["files"].items()}
    assert roles["m.gguf"] == "dense" and roles["m.powerinfer.gguf"] == "sparse"
    assert "predictor" not in roles.values()
    line = "m.powerinfer.gguf: no predictors: hotcold can run it in exact mode, PowerInfer cannot run it"
    assert line in capsys.readouterr().err.splitlines()
    export(model, tmp_path / "with", make_predictors(model))
    plain, whole = (GGUFFile(tmp_path / name / "m.powerinfer.gguf") for name in ("b", "with"))
    assert set(whole.tensors) - set(plain.tensors) == {n for n in whole.tensors if ".fc" in n}
    assert all(np.array_equal(t.data, whole.tensors[n].data) for n, t in plain.tensors.items())
    gone = set(whole.metadata) - set(plain.metadata)
    assert gone and all("predictor" in key or "hot." in key or "threshold" in key for key in gone)


def test_a_model_that_is_never_zero_has_no_form_by_neurons(make_model, tmp_path):
    manifest = export(make_model("silu"), tmp_path / "b")
    assert [file["role"] for file in manifest["files"].values()].count("sparse") == 0


def test_a_function_that_llama_cpp_lacks_is_told(model, make_predictors, tmp_path, capsys):
    fat = changed_config(model, tmp_path / "fat", hidden_act="fatrelu", hidden_act_param=0.25)
    manifest = export(fat, tmp_path / "b", make_predictors(fat))
    assert manifest["llama_cpp_exact"] is False
    err = capsys.readouterr().err
    assert (
        "llama.cpp will compute a different function: relu instead of fatrelu with thresholds up to 0.25"
        in err
    )
    assert "PowerInfer can only run its own ReLU models" in err
    metadata = GGUFFile(tmp_path / "b" / "m.powerinfer.gguf").metadata
    assert (metadata["hotcold.activation"], metadata["hotcold.activation_thresholds"].tolist()) == (
        "fatrelu",
        [0.25] * 3,
    )


def test_predictors_of_another_model_are_refused(model, make_model, make_predictors, tmp_path):
    other = make_predictors(make_model(seed=1))
    with pytest.raises(
        MismatchError, match=r"predictors of another model \(got [0-9a-f]{12}, expected [0-9a-f]{12}\)"
    ):
        export(model, tmp_path / "b", other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"d_ff": 80},
            FormatError,
            r"layers\.0\.fc2\.weight: .*F32 \[160, 32\].*F32 \[80, 32\]",
        ),
        ({"n_layers": 2, "ranks": [32] * 2, "thresholds": [0.0] * 2}, ShapeError, r"got \(2, 64, 160\)"),
        ({"thresholds": [0.0, float("nan"), 0.0]}, FormatError, r"thresholds\[1\]: not a number"),
        ({"format": "x"}, FormatError, r"format: not of this format \(got 'x', expected hotcold-predictor\)"),
    ],
)
def test_broken_predictors_are_refused(model, make_predictors, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        export(model, tmp_path / "b", make_predictors(model, **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_threshold_of_minus_infinity_is_kept(model, make_predictors, tmp_path):
    export(model, tmp_path / "b", make_predictors(model, thresholds=[-float("inf")] * 3))
    metadata = GGUFFile(tmp_path / "b" / "m.powerinfer.gguf").metadata
    assert np.isneginf(metadata["hotcold.predictor.thresholds"]).all()


def test_predictors_for_a_silu_are_refused(make_model, make_predictors, tmp_path):
    silu = make_model("silu")
    with pytest.raises(UnsupportedError, match="this activation is never zero"):
        export(silu, tmp_path / "b", make_predictors(silu))


def test_an_unknown_activation_names_the_known_ones(model, tmp_path):
    mish = changed_config(model, tmp_path / "mish", hidden_act="mish")
    with pytest.raises(UnsupportedError, match=r"got mish, expected relu \| relu2 \| drelu \| fatrelu_T"):
        export(mish, tmp_path / "b")


def test_weights_that_would_be_lost_are_refused(model, tmp_path):
    cut = changed_config(model, tmp_path / "cut", num_hidden_layers=2)
    with pytest.raises(
        UnsupportedError, match=r"tensors of an unknown kind \(got model\.layers\.2\..* and 8 more\)"
    ):
        export(cut, tmp_path / "b")


def test_weights_that_do_not_fit_the_config(model, tmp_path):
    wrong = changed_config(model, tmp_path / "wrong", intermediate_size=128)
    with pytest.raises(ShapeError, match=r"tensor \S*mlp\.gate_proj\.weight does not fit the model"):
        export(wrong, tmp_path / "b")


def test_another_folder_is_never_replaced(model, tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="not empty, and hotcold did not write it"):
        export(model, out)
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "manifest.json").write_text('{"format": "another"}')
    with pytest.raises(StorageError, match="not empty, and hotcold did not write it"):
        export(model, out)


def test_an_earlier_bundle_is_replaced(model, tmp_path):
    export(model, tmp_path / "b", options=ExportOptions("q4_0"))
    assert export(model, tmp_path / "b", options=ExportOptions("f16"))["quant"] == "f16"
    assert GGUFFile(tmp_path / "b" / "m.gguf").tensors["token_embd.weight"].type == "F16"


@pytest.mark.parametrize("space", [100, 100_000, 200_000, 300_000])
def test_a_full_disk_leaves_nothing(model, make_predictors, tmp_path, monkeypatch, space):
    predictors = make_predictors(model)

    class Full(storage.FileSystem):
        written = 0

        def write(self, file, data):
            self.written += len(data)
            if self.written > space:
                raise OSError(28, "No space left on device")
            super().write(file, data)

    monkeypatch.setattr(storage, "fs", Full())
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        export(model, tmp_path / "b", predictors)
    assert list(tmp_path.iterdir()) == []


class Failing(storage.FileSystem):
    """Counts operations; the one numbered `fail_at` fails."""

    def __init__(self, fail_at: int = -1) -> None:
        self.fail_at, self.count = fail_at, 0

    def step(self) -> None:
        self.count += 1
        if self.count == self.fail_at:
            raise OSError(5, "Input/output error")

    def open(self, path, mode):
        self.step()
        return super().open(path, mode)

    def write(self, file, data):
        self.step()
        super().write(file, data)

    def fsync(self, file):
        self.step()
        super().fsync(file)

    def replace(self, source, target):
        self.step()
        super().replace(source, target)


def test_whichever_operation_fails_the_old_bundle_is_there(model, make_predictors, tmp_path, monkeypatch):
    predictors, out = make_predictors(model), tmp_path / "b"
    old = export(model, out, options=ExportOptions("f16"))
    counting = Failing()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "fs", counting)
        export(model, tmp_path / "other", predictors)
    shutil.rmtree(tmp_path / "other")
    for fail_at in [*range(1, counting.count, 11), counting.count - 1]:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "fs", Failing(fail_at))
            with pytest.raises(StorageError, match="Input/output error"):
                export(model, out, predictors)
        assert list(tmp_path.iterdir()) == [out]
        assert json.loads((out / "manifest.json").read_text()) == old
        assert verify_bundle(out) == []


@pytest.mark.parametrize("name", ["", "a/b", ".."])
def test_a_name_stays_inside_the_bundle(model, tmp_path, name):
    with pytest.raises(InputError, match="not a plain file name"):
        export_bundle(HFCheckpoint(model), tmp_path / "b", name=name, fingerprint="0" * 64)


def test_without_tokenizer_folder_the_files_hold_no_vocabulary(model, tmp_path):
    export_bundle(HFCheckpoint(model), tmp_path / "b", name="m", fingerprint="0" * 64)
    assert GGUFFile(tmp_path / "b" / "m.gguf").metadata["tokenizer.ggml.model"] == "none"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "/nowhere"], "no such model"),
        (["--hot-frequency", "0"], "must be above 0"),
        (["--predictors", "/nowhere"], "no predictors in this folder"),
    ],
)
def test_user_errors_are_one_line(model, tmp_path, capsys, arguments, message):
    assert main(["export", "--model", str(model), "--out", str(tmp_path / "b"), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hotcold export: error: ")
    assert (message in err, err.count("\n")) == (True, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_file_is_exported_too(make_model, tmp_path, capsys):
    silu = make_model("silu")
    export(silu, tmp_path / "first", options=ExportOptions("f32"))
    arguments = ["--quant", "f32", "--name", "m", "--out", str(tmp_path / "again")]
    assert main(["export", "--model", str(tmp_path / "first" / "m.gguf"), *arguments]) == 0
    assert "quantized" not in capsys.readouterr().err
    first, again = (GGUFFile(tmp_path / name / "m.gguf") for name in ("first", "again"))
    assert set(first.tensors) == set(again.tensors)
    for name, tensor in first.tensors.items():
        assert tensor.data.tobytes() == again.tensors[name].data.tobytes()


def test_ends_of_text_and_chat_templates_go_all_the_way(make_model, tmp_path):
    """HF directory, bundle, its GGUF file alone, llama.cpp, and a bundle out of that file again."""
    source = shutil.copytree(make_model("silu"), tmp_path / "model")
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"pad_token": "<|endoftext|>"}
    settings["chat_template"] = [
        {"name": "default", "template": "{{ pad_token }}{{ tools is none }}"},
        {"name": "tool_use", "template": "{{ tools | tojson }}"},
    ]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    storage.write_json(source / "generation_config.json", {"eos_token_id": [2, 9, 11, 13]})
    export(source, tmp_path / "first")
    gguf = tmp_path / "first" / "m.gguf"
    assert main(["export", "--model", str(gguf), "--quant", "f32", "--out", str(tmp_path / "second")]) == 0
    for path in (tmp_path / "first", gguf, tmp_path / "second"):
        loaded = Vocabulary.load(path)
        assert loaded.stop_ids >= {2, 9, 11, 13} and loaded.stop_ids <= {0, 2, 9, 11, 13}
        assert loaded.chat([]) == "<|endoftext|>True"
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert verify_bundle(folder) == []
        [file] = folder.glob("*.gguf")
        assert GGUFFile(file).require("tokenizer.chat_template.tool_use", str) == "{{ tools | tojson }}"
    assert (tmp_path / "second" / "additional_chat_templates" / "tool_use.jinja").is_file()
    llama_cpp = pytest.importorskip("llama_cpp")
    engine = llama_cpp.Llama(str(gguf), n_ctx=32, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(engine.model)
    assert [i for i in (2, 9, 11, 13) if llama_cpp.llama_vocab_is_eog(vocabulary, i)] == [2, 9, 11]
