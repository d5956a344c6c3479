"""Every artifact that hotcold writes, with every operation of the file system failing in turn.

After a failure there is the old artifact or the new one, byte for byte, and nothing else; the next try
succeeds. (Traces grow, so that theirs is another rule: tests/predictor/test_crash.py.)
"""

from __future__ import annotations

import shutil
from pathlib import Path

import handmade
import numpy as np
import pytest
from faulty import FAULTS, FaultyFileSystem, tree

from hotcold import storage
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.gguf.write import planned, write_gguf
from hotcold.convert.powerinfer.firing_counts import write_firing_counts
from hotcold.convert.powerinfer.gpu_index import GpuIndex
from hotcold.convert.powerinfer.model_pt import write_model_pt
from hotcold.errors import StorageError
from hotcold.model import checkpoint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.predictor.training.metrics import LayerMetrics


def predictors(seed: int) -> PredictorBundle:
    rng = np.random.default_rng(seed)
    shapes = ((2, 8), (12, 2), (12,))
    fc1, fc2, frequency = (rng.random(shape).astype(np.float32) for shape in shapes)
    layer = LayerPredictor(fc1, fc2, 0.5, frequency, LayerMetrics(0.9, 0.5, 0.5, 0.8))
    return PredictorBundle(handmade.FINGERPRINT, [layer], 0.95)


def put_gguf(folder: Path, seed: int) -> None:
    plans = [planned(name, (4, 32), "Q8_0", lambda: np.full((4, 32), seed)) for name in ("a", "b")]
    write_gguf(folder / "m.gguf", {"seed": np.uint32(seed)}, plans)


def put_gpu_index(folder: Path, seed: int) -> None:
    GpuIndex([np.array([seed, 3], np.int32)], 4, 1 << 30).write(folder / "m.gpuidx")


def put_predictors(folder: Path, seed: int) -> None:
    predictors(seed).save(folder / "predictors")


def put_model_pt(folder: Path, seed: int) -> None:
    write_model_pt(predictors(seed), folder / "model_pt")


def put_activation(folder: Path, seed: int) -> None:
    write_firing_counts([np.full(4, seed, np.float32)], folder / "activation")


def put_bundle(folder: Path, seed: int) -> None:
    model = folder.parent / "model"
    if not model.exists():
        model.mkdir()
        handmade.checkpoint(model)
        config = handmade.model_config() | {"hidden_act": "relu"}
        (model / "config.json").write_bytes(handmade.as_json(config))
    export_bundle(
        HFCheckpoint(model), folder / "bundle", name="m", fingerprint=handmade.FINGERPRINT,
        predictors=predictors(seed), options=ExportOptions("f16"),
    )  # fmt: skip


def put_checkpoint(folder: Path, seed: int) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=4
    )
    torch.manual_seed(seed)
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    files = {"note.txt": str(seed).encode()}
    checkpoint.save(LlamaForCausalLM(config), tokenizer, folder / "hf", files=files)


WRITERS = [
    put_gguf, put_gpu_index, put_predictors, put_model_pt, put_activation, put_bundle, put_checkpoint
]  # fmt: skip


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "interrupt"])
@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_the_old_or_the_new_state(tmp_path, monkeypatch, write, fault):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, seed in ((old, 1), (new, 2)):
        folder.mkdir()
        write(folder, seed)
    states = (tree(old), tree(new))
    assert states[0] != states[1]
    for n in range(1, 200):
        folder = tmp_path / str(n)
        shutil.copytree(old, folder)
        faulty = FaultyFileSystem(n, fault)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "fs", faulty)
            raised = None
            try:
                write(folder, 2)
            except StorageError as error:
                raised = error
        assert (raised is not None) == faulty.struck
        assert tree(folder) in states if raised else tree(folder) == states[1]
        if not raised:
            break
        if n % 7 == 0:
            write(folder, 2)
            assert tree(folder) == states[1]
        shutil.rmtree(folder)
    assert n > 4, "no fault was met"
