"""The norm and the gates that a checkpoint gives, against transformers' own modules, family by family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_families import D_MODEL, FAMILIES, N_LAYERS, write_model

from hotcold.convert.bundle.export import ExportOptions, export_file
from hotcold.model import checkpoint
from hotcold.model.gates import Gates
from hotcold.model.huggingface import HFCheckpoint

X = (np.random.default_rng(0).standard_normal((9, D_MODEL)) * 3 + 0.5).astype(np.float16)


def check(gates: Gates, model: Path) -> None:
    for number, modules in enumerate(checkpoint.ffn_layers(checkpoint.load_model(str(model)))):
        layer = gates.layer(number)
        with torch.no_grad():
            h = modules.norm(torch.from_numpy(X).float())
            gate = torch.nn.functional.linear(h, modules.gate.weight)
        np.testing.assert_allclose(layer.normed(X), h, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.normed(X) @ layer.weight.T, gate, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "minicpm-relu", "opt", "falcon-7b-relu", "falcon-40b-relu"]
)
def test_they_are_transformers(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "m", FAMILIES[name])
    gates = Gates(str(tmp_path / "m"))
    assert gates.spec.n_layers == N_LAYERS
    check(gates, tmp_path / "m")


def test_those_of_a_gguf_file_are_the_same(tmp_path: Path) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    options = ExportOptions("f32")
    export_file(
        HFCheckpoint(tmp_path / "m"),
        tmp_path / "m.gguf",
        "dense",
        name="m",
        fingerprint="0" * 64,
        options=options,
    )
    check(Gates(str(tmp_path / "m.gguf")), tmp_path / "m")
