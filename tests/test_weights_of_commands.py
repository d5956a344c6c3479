"""Every command that reads a model reads its weights by one rule: a hole and a NaN are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_families import FAMILIES, random_predictors, write_model
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from hotcold.cli import main
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.files.gguf import GGUFFile
from hotcold.model.checkpoint import fingerprint
from hotcold.model.huggingface import HFCheckpoint

TENSOR, STORED = "model.layers.1.mlp.up_proj.weight", "ffn_up"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a checkpoint, its bundle with predictors, and a text."""
    root = tmp_path_factory.mktemp("whole")
    write_model(root / "m", FAMILIES["llama"])
    byte_level = {char: n for n, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(byte_level, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save(str(root / "m/tokenizer.json"))
    rng = np.random.default_rng(0)
    texts = (" ".join(f"w{n}" for n in rng.integers(0, 99, 60)) for _ in range(200))
    (root / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    random_predictors(root / "m", root / "p")
    return root


FROM_FOLDER = {
    "collect-traces": "--model m --text t.jsonl --tokens 512 --window 32 --out tr -t 1",
    "sparsify": "--model m --text t.jsonl --tokens 4096 --out sp",
    "shift-thresholds": "--model m --text t.jsonl --tokens 256 --window 32 --out sh",
    "sparsity-card": "--dense m --text t.jsonl --part all --tokens 256 --window 32",
    "export": "--model m --predictors p --quant f32 --out b",
    "convert": "m --to gguf --out m.gguf",
}


@pytest.mark.parametrize("damage", ["a hole", "a NaN"])
@pytest.mark.parametrize("name", FROM_FOLDER)
def test_commands_that_read_a_checkpoint(name, damage, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "m/model.safetensors")
    if damage == "a hole":
        del tensors[TENSOR]
    else:
        tensors[TENSOR][3, 3] = np.nan
    save_file(tensors, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "p/config.json").read_text())
    (tmp_path / "p/config.json").write_text(json.dumps(config | {"model_fingerprint": fingerprint("m")}))
    assert main([name, *FROM_FOLDER[name].split()]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    name = "blk.1.ffn_up" if "blk." in message else TENSOR
    assert (
        "missing tensor" if damage == "a hole" else "a value is not finite"
    ) in message and name in message


@pytest.fixture(scope="module")
def damaged_bundles(whole, tmp_path_factory) -> dict[str, Path]:
    """Bundles whose files say that they are whole, with a NaN in a weight or without the tensor."""
    made = {}
    for damage in ("a hole", "a NaN"):
        folder = tmp_path_factory.mktemp("bundle") / "b"
        export_bundle(
            HFCheckpoint(whole / "m"), folder, name="m", fingerprint=fingerprint(str(whole / "m")),
            folder=whole / "m", options=ExportOptions("f32"),
        )  # fmt: skip
        path, made[damage] = folder / "m.gguf", folder
        name = next(name for name in GGUFFile(path).tensors if name.startswith(f"blk.1.{STORED}"))
        data, file = bytearray(path.read_bytes()), GGUFFile(path)
        if damage == "a hole":
            at = data.index(name.encode())
            data[at : at + len("blk.1.ffn_up")] = b"blk.1.ffn_xx"
        else:
            at = data.index(bytes(file.tensors[name].data[:64]))
            data[at : at + 4] = np.float32(np.nan).tobytes()
        path.write_bytes(data)
    return made


FROM_BUNDLE = {
    "run": "b --mode dense -p w1 -n 3 -t 1",
    "run a file": "b/m.gguf --mode dense -p w1 -n 3 -t 1",
    "perplexity": "--bundle b --mode dense --text t.jsonl --tokens 256 --window 32 -t 1 --json",
    "bench": "--bundle b --modes dense --text t.jsonl -r 1 -p 8 -n 4 --quality-tokens 64 --window 32 -t 1",
    "export": "--model b/m.gguf --out again",
    "convert": "b/m.gguf --to bundle --out again",
    "collect-traces": "--model b/m.gguf --text t.jsonl --tokens 512 --window 32 --out tr -t 1",
}


@pytest.mark.parametrize("damage", ["a hole", "a NaN"])
@pytest.mark.parametrize("name", FROM_BUNDLE)
def test_commands_that_read_a_gguf_file(name, damage, whole, damaged_bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").symlink_to(damaged_bundles[damage])
    (tmp_path / "t.jsonl").symlink_to(whole / "t.jsonl")
    assert main([name.split()[0], *FROM_BUNDLE[name].split()]) == 2
    captured = capsys.readouterr()
    message = captured.err.splitlines()[-1]
    assert ("is not finite" if damage == "a NaN" else "tensor") in message
    assert "ffn_up" in message or "ffn_xx" in message
    assert "NaN" not in captured.out
