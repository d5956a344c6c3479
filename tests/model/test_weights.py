"""Checkpoints of every family with a tensor too few, too many, renamed or of another shape.

Whatever reads them refuses them by that tensor's name, or computes what transformers computes. What one
family, layout or command does is what the others must do: none has its own way of reading weights.
"""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_families import FAMILIES, IDS, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.errors import FormatError, HotcoldError, InputError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model import checkpoint
from hotcold.model.ffn_modules import as_transformers
from hotcold.model.huggingface import HFCheckpoint
from hotcold.model.spec import ModelSpec
from hotcold.model.weights import check_weights
from hotcold.runtime.cpu.engine import CpuEngine as Engine

Tensors = dict[str, np.ndarray]
CHANGES = ("removed", "renamed", "reshaped", "added")
LAYOUTS = ("single", "sharded")


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for name, config in FAMILIES.items():
        write_model(root / name, config)
    return {name: root / name for name in FAMILIES}


def write(folder: Path, config: dict, tensors: Tensors, layout: str = "single") -> Path:
    """A checkpoint as the `safetensors` library writes it, in one file or in two shards with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if layout == "single":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def changed(tensors: Tensors, change: str, name: str) -> tuple[Tensors, str]:
    """One tensor removed, renamed, cut or added, and the name that an error must bear."""
    tensors = dict(tensors)
    match change:
        case "removed":
            del tensors[name]
        case "renamed":
            tensors[f"{name}s"] = tensors.pop(name)
        case "reshaped":
            tensors[name] = np.ascontiguousarray(tensors[name][:-1])
        case "added":
            name += "s"
            tensors[name] = np.zeros(3, np.float32)
    return tensors, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_a_checkpoint_is_needed_and_no_other(name, layout, families, tmp_path):
    """Each one removed for export and convert, which share a check; a few for what loads it in torch."""
    config, tensors = FAMILIES[name], load_file(families[name] / "model.safetensors")
    spec, rng = ModelSpec.from_config(config), random.Random(zlib.crc32(f"{name} {layout}".encode()))
    chosen = {change: rng.choice(sorted(tensors)) for change in CHANGES}
    folder = tmp_path / "m"
    for change in CHANGES:
        every = change == "removed" and layout == "single"
        for tensor in tensors if every else [chosen[change]]:
            other, culprit = changed(tensors, change, tensor)
            write(folder, config, other, layout)
            with pytest.raises(HotcoldError) as caught:
                check_weights(HFCheckpoint(folder), spec)
            assert culprit in str(caught.value)
            if tensor == chosen[change]:
                with pytest.raises(HotcoldError) as caught:
                    checkpoint.load_model(str(folder))
                assert culprit in str(caught.value)
    write(folder, config, tensors, layout)
    check_weights(HFCheckpoint(folder), spec)


def transformers_logits(folder: Path) -> np.ndarray:
    """What transformers computes when it reads the files itself."""
    config = as_transformers(json.loads((folder / "config.json").read_text()))
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.for_model(**config))
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


def our_logits(folder: Path) -> np.ndarray:
    with torch.no_grad():
        return checkpoint.load_model(str(folder))(torch.from_numpy(IDS)[None]).logits[0].numpy()


def engine_logits(folder: Path, out: Path) -> np.ndarray:
    """Of the CPU engine, from the folder's export."""
    export_bundle(HFCheckpoint(folder), out, name="m", fingerprint="0" * 64, options=ExportOptions("f32"))
    return Engine.load(out, "dense", 1, n_ctx=64).prefill(IDS, all_logits=True)


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.linalg.norm(one - other) < 2e-3 * np.linalg.norm(other))


HEADED = ("llama-silu-tied", "qwen3-silu-tied", "opt", "falcon-7b-relu", "granite", "minicpm")


def with_head(name: str, families: dict[str, Path]) -> tuple[dict, Tensors, str]:
    """A tied model of a family, and the name of its embedding."""
    config, tensors = (
        FAMILIES[name] | {"tie_word_embeddings": True},
        load_file(families[name] / "model.safetensors"),
    )
    tensors.pop("lm_head.weight", None)
    embedding = next(name for name in tensors if "embed_tokens" in name or "word_embeddings" in name)
    return config, tensors, embedding


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", HEADED)
def test_a_head_of_its_own_beside_a_config_that_ties_it(name, layout, families, tmp_path, capfd):
    """transformers takes the file's head; so do we, in torch, in an export and in a GGUF file read back."""
    config, tensors, embedding = with_head(name, families)
    own = np.random.default_rng(3).standard_normal(tensors[embedding].shape).astype(np.float32) * 0.15
    folder = write(tmp_path / "m", config, tensors | {"lm_head.weight": own}, layout)
    loaded, exported = our_logits(folder), engine_logits(folder, tmp_path / "b")
    assert "a separate head" in capfd.readouterr().err
    if config["model_type"] != "minicpm":  # which transformers does not know
        np.testing.assert_array_equal(loaded, transformers_logits(folder))
    assert close(exported, loaded)
    tied = write(tmp_path / "tied", config, tensors, layout)
    assert not close(our_logits(tied), loaded)
    assert "output.weight" in GGUFFile(tmp_path / "b/m.gguf").tensors
    assert json.loads((tmp_path / "b/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", HEADED)
def test_a_copy_of_the_embedding_is_a_tied_head(name, families, tmp_path):
    config, tensors, embedding = with_head(name, families)
    both = write(tmp_path / "both", config, tensors | {"lm_head.weight": tensors[embedding].copy()})
    tied = write(tmp_path / "tied", config, tensors)
    np.testing.assert_array_equal(our_logits(both), our_logits(tied))
    model = checkpoint.load_model(str(both))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    engine_logits(both, tmp_path / "b")
    assert "output.weight" not in GGUFFile(tmp_path / "b/m.gguf").tensors


@pytest.mark.parametrize("said", [False, None])
def test_a_missing_head_that_nothing_ties_is_refused(said, families, tmp_path):
    config, tensors = dict(FAMILIES["llama"]), load_file(families["llama"] / "model.safetensors")
    del tensors["lm_head.weight"], config["tie_word_embeddings"]
    folder = write(tmp_path / "m", config | ({} if said is None else {"tie_word_embeddings": said}), tensors)
    for read in (lambda: checkpoint.load_model(str(folder)), lambda: engine_logits(folder, tmp_path / "b")):
        with pytest.raises(FormatError, match=r"lm_head\.weight: missing tensor"):
            read()


PREFIXES = ["_orig_mod.", "base_model.model.", "module.", "module._orig_mod.", "language_model."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["llama", "opt", "falcon-7b-relu"])
def test_a_prefix_is_taken_off_and_said(name, prefix, families, tmp_path, capfd):
    config, tensors = FAMILIES[name], load_file(families[name] / "model.safetensors")
    folder = write(tmp_path / "m", config, {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    np.testing.assert_array_equal(our_logits(folder), our_logits(families[name]))
    lines = [line for line in capfd.readouterr().err.splitlines() if "removed from" in line]
    assert len(lines) == 1 and all(part in lines[0] for part in prefix.split(".")[:-1])
    source = HFCheckpoint(folder)
    assert source.names() == set(tensors)
    for tensor in tensors:
        np.testing.assert_array_equal(source.load(tensor), tensors[tensor])


def test_a_prefix_beside_plain_names_of_the_same_tensors_is_refused(families, tmp_path):
    tensors = load_file(families["llama"] / "model.safetensors")
    folder = write(
        tmp_path / "m", FAMILIES["llama"], tensors | {"module.lm_head.weight": tensors["lm_head.weight"]}
    )
    with pytest.raises(FormatError, match=r"lm_head\.weight: two tensors with the same name"):
        checkpoint.load_model(str(folder))


@pytest.mark.parametrize("name", ["llama", "opt", "falcon-7b-relu"])
def test_known_buffers_are_passed_over(name, families, tmp_path):
    tensors = load_file(families[name] / "model.safetensors")
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "model.layers.0.self_attn.masked_bias": np.float32(-1e9).reshape(1),
        "transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.uint8),
    }
    folder = write(tmp_path / "m", FAMILIES[name], tensors | buffers)
    np.testing.assert_array_equal(our_logits(folder), our_logits(families[name]))
    check_weights(HFCheckpoint(folder), ModelSpec.from_config(FAMILIES[name]))


def test_shards(families, tmp_path):
    config, tensors = FAMILIES["llama"], load_file(families["llama"] / "model.safetensors")
    two = "model-00002-of-00002.safetensors"

    def broken(name: str, edit) -> Path:
        folder = write(tmp_path / name, config, tensors, "sharded")
        edit(folder, json.loads((folder / "model.safetensors.index.json").read_text()))
        return folder

    def refused(folder: Path, error: type[HotcoldError], message: str) -> None:
        for read in (checkpoint.load_model, checkpoint.fingerprint):
            if read is checkpoint.load_model or error is InputError:
                with pytest.raises(error, match=message):
                    read(str(folder))
        with pytest.raises(error, match=message):
            check_weights(HFCheckpoint(folder), ModelSpec.from_config(config))

    def without_index(folder, _):
        (folder / "model.safetensors.index.json").unlink()

    def unnamed(folder, index):
        index["weight_map"].pop("lm_head.weight")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    def hole(folder, index):
        shard = folder / index["weight_map"]["lm_head.weight"]
        save_file({name: t for name, t in load_file(shard).items() if name != "lm_head.weight"}, shard)

    def lost(folder, _):
        (folder / two).unlink()

    with pytest.raises(InputError, match=two):
        checkpoint.load_model(str(broken("lost", lost)))
    refused(broken("no index", without_index), InputError, r"shards without model\.safetensors\.index\.json")
    refused(
        broken("unnamed", unnamed), FormatError, r"lm_head\.weight: a tensor that the index does not name"
    )
    refused(broken("hole", hole), FormatError, r"lm_head\.weight: missing tensor")
    whole = broken("whole", lambda *_: None)
    np.testing.assert_array_equal(our_logits(whole), our_logits(families["llama"]))


@pytest.mark.parametrize("metadata", [None, {"format": "mlx"}])
def test_what_a_file_says_of_its_writer_does_not_matter(metadata, families, tmp_path):
    tensors = load_file(families["llama"] / "model.safetensors")
    folder = write(tmp_path / "m", FAMILIES["llama"], tensors)
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    np.testing.assert_array_equal(our_logits(folder), our_logits(families["llama"]))


def test_an_adapter_is_refused_by_its_folder(families, tmp_path):
    save_file({"base_model.model.x.lora_A.weight": np.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match=r"an adapter, not a model; merge the adapter first"):
        checkpoint.load_model(str(tmp_path))


def test_other_safetensors_in_the_folder_are_none_of_the_model(families, tmp_path):
    folder = write(tmp_path / "m", FAMILIES["llama"], load_file(families["llama"] / "model.safetensors"))
    before, logits = checkpoint.fingerprint(str(folder)), our_logits(folder)
    save_file({f"{n}": np.ones(1, np.float32) for n in range(999)}, folder / "consolidated.safetensors")
    assert checkpoint.fingerprint(str(folder)) == before
    np.testing.assert_array_equal(our_logits(folder), logits)
    config = FAMILIES["llama"] | {"num_hidden_layers": 500}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="too many layers"):  # though the other file holds as many tensors
        checkpoint.load_model(str(folder))


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes"])
def test_quantized_checkpoints_are_refused_by_their_config(method, families, tmp_path):
    config = FAMILIES["llama"] | {"quantization_config": {"quant_method": method}}
    folder = write(tmp_path / "m", config, load_file(families["llama"] / "model.safetensors"))
    for read in (lambda: checkpoint.load_model(str(folder)), lambda: engine_logits(folder, tmp_path / "b")):
        with pytest.raises(UnsupportedError, match=rf"config\.json: quantized weights \(got {method}\)"):
            read()


def test_float8_without_its_config_is_refused(families, tmp_path):
    """With its scales and without them."""
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    name, folder = "model.layers.1.mlp.up_proj.weight", write(tmp_path / "m", FAMILIES["llama"], {})
    tensors = load_torch(families["llama"] / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    for more, message in ({}, rf"dtype of {name} \(got F8_E4M3"), (
        {f"{name}_scale_inv": torch.ones(1)}, f"got {name}_scale_inv"
    ):  # fmt: skip
        save_torch(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
        for read in (
            lambda: checkpoint.load_model(str(folder)),
            lambda: engine_logits(folder, tmp_path / "b"),
        ):
            with pytest.raises(UnsupportedError, match=message.replace(".", r"\.")):
                read()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "tensor", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
)
def test_values_that_are_no_numbers_are_refused(tensor, value, families, tmp_path):
    tensors = load_file(families["llama"] / "model.safetensors")
    tensors[tensor].reshape(-1)[5] = value
    folder = write(tmp_path / "m", FAMILIES["llama"], tensors)
    for read in (lambda: checkpoint.load_model(str(folder)), lambda: engine_logits(folder, tmp_path / "b")):
        with pytest.raises(FormatError, match=f"{tensor}: a value is not finite".replace(".", r"\.")):
            read()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "value, quant, fits",
    [
        (1e6, "f16", False), (1e6, "q4_0", False), (1e6, "q4_1", False), (1e6, "q8_0", True),
        (1e6, "bf16", True), (1e6, "f32", True), (3.4e38, "f32", True), (3.4e38, "bf16", False),
        (3.4e38, "q8_0", False),
    ],
)  # fmt: skip
def test_values_beyond_the_type_that_is_written_are_refused(value, quant, fits, families, tmp_path):
    tensors = load_file(families["llama"] / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    folder = write(tmp_path / "m", FAMILIES["llama"], tensors)

    def export() -> None:
        options = ExportOptions(quant, "f32")
        export_bundle(HFCheckpoint(folder), tmp_path / "b", name="m", fingerprint="0" * 64, options=options)

    if fits:
        export()
        Engine.load(tmp_path / "b", "dense", 1, n_ctx=64)
    else:
        with pytest.raises(FormatError, match=r"blk\.0\.ffn_up\S*: a value is not finite in"):
            export()
        assert not (tmp_path / "b").exists()
    if value == 1e6:
        with pytest.raises(FormatError, match=r"up_proj\.weight: a value is not finite in float16"):
            checkpoint.load_model(str(folder), "float16")
        checkpoint.load_model(str(folder), "bfloat16")


def test_float64_beyond_float32_is_refused(families, tmp_path):
    tensors = load_file(families["llama"] / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64) * 1e300
    folder = write(tmp_path / "m", FAMILIES["llama"], tensors)
    with pytest.raises(FormatError, match=r"model\.norm\.weight: a value is not finite"):
        checkpoint.load_model(str(folder))


@pytest.mark.parametrize(
    "error", [ImportError("no accelerate"), MemoryError(), OSError(28, "disk"), KeyboardInterrupt()]
)
def test_what_is_not_the_files_fault_keeps_its_words(error, families, monkeypatch):
    def fail(*_, **__):
        raise error

    for place in ("from_config", "from_pretrained"):
        with monkeypatch.context() as patch:
            owner = AutoModelForCausalLM
            if place == "from_pretrained":
                from transformers import LlamaForCausalLM as owner
            patch.setattr(owner, place, fail)
            with pytest.raises(type(error)) as caught:
                checkpoint.load_model(str(families["llama"]))
            assert caught.value is error


def test_what_generation_needs_comes_along(families, tmp_path):
    folder = write(tmp_path / "m", FAMILIES["llama"], load_file(families["llama"] / "model.safetensors"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "bos_token_id": 0}))
    assert checkpoint.load_model(str(folder)).generation_config.eos_token_id == [1, 2]
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(FormatError, match=r"generation_config\.json, content: is not JSON"):
        checkpoint.load_model(str(folder))
