"""accelerate behind our interface: the same numbers as our engine, with weights that really are elsewhere."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch

from hotcold.errors import InputError
from hotcold.eval.peers import offloading
from hotcold.eval.peers.offloading import Accelerate, layout_of
from hotcold.files.gguf import GGUFFile
from hotcold.model import checkpoint
from hotcold.runtime.cpu.engine import CpuEngine as Engine

IDS = np.array([5, 77, 123, 9, 200, 42, 42, 7, 250, 11, 19, 201], dtype=np.int32)


@pytest.fixture(scope="module", params=[False, True], ids=["with a head", "tied"])
def path(request, make_dense_file):
    """Four layers: enough for some on either side, with one layer's worth kept free."""
    return make_dense_file(num_hidden_layers=4, tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def budget(path):
    """For the embedding, two layers, and what accelerate keeps free."""
    sizes = {name: tensor.data.nbytes for name, tensor in GGUFFile(path).tensors.items()}
    layer = sum(size for name, size in sizes.items() if name.startswith("blk.1."))
    return sizes["token_embd.weight"] + int(3.2 * layer)


@pytest.fixture
def side(path, budget):
    side = Accelerate(path, device="cpu", budget=budget)
    yield side
    side.close()


def places(side: Accelerate) -> list[str]:
    """Where each layer's FFN is between two tokens; what is offloaded is on torch's `meta`."""
    return [layer.mlp.up_proj.weight.device.type for layer in side._model.model.layers]


def assert_close(logits: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(logits, expected, atol=0.01 * np.abs(expected).max())


def test_computes_what_our_engine_computes(path, side):
    assert places(side) == ["cpu", "cpu", "meta", "meta"]
    engine = Engine.load(path, "dense", 1, 64)
    expected, logits = engine.prefill(IDS, all_logits=True), side.prefill(IDS, all_logits=True)
    assert logits.shape == expected.shape and logits.dtype == np.float32
    assert_close(logits, expected)
    for _ in range(8):
        token = int(expected[-1].argmax())
        expected = engine.decode(token)[None]
        assert_close(side.decode(token), expected[0])


def test_token_by_token_equals_a_block(side):
    block = side.prefill(IDS, all_logits=True)
    side.reset()
    first = side.prefill(IDS[:4])
    rest = [side.decode(int(token)) for token in IDS[4:]]
    assert_close(np.array([first, *rest]), block[3:])


@pytest.mark.parametrize(("share", "where"), [(0.0, "meta"), (2.0, "cpu")])
def test_nothing_or_all_on_the_device(path, side, share, where):
    """With one place alone accelerate goes other ways."""
    total = sum(tensor.data.nbytes for tensor in GGUFFile(path).tensors.values())
    other = Accelerate(path, device="cpu", budget=int(share * total))
    assert set(places(other)) == {where} and (other.device_bytes > 0) == (share > 0)
    np.testing.assert_array_equal(other.prefill(IDS), side.prefill(IDS))
    other.close()


def test_device_bytes_are_those_of_the_weights_that_stay(side, budget):
    stay = sum(weight.nbytes for weight in side._model.parameters() if not weight.is_meta)
    tables = sum(buffer.nbytes for buffer in side._model.buffers())
    assert 0 < stay <= side.device_bytes <= stay + tables < budget


def test_what_a_gpu_has_no_room_for_is_in_ram(path, budget):
    layout = layout_of(checkpoint.load_model(str(path), "float16"), 0, budget)
    layers = [layout[f"model.layers.{i}"] for i in range(4)]
    assert layers == [0, 0, "cpu", "cpu"] and "disk" not in layout.values()


def test_weights_are_of_the_type_in_the_file(path, side, budget, monkeypatch):
    assert side._model.dtype == torch.float16
    monkeypatch.setattr(offloading, "_DTYPES", {})
    other = Accelerate(path, device="cpu", budget=budget)
    assert other._model.dtype == torch.bfloat16
    other.close()


def test_nothing_is_left_behind(path, budget, tmp_path, monkeypatch):
    monkeypatch.setattr(offloading.tempfile, "tempdir", str(tmp_path))
    side = Accelerate(path, device="cpu", budget=budget)
    assert list(tmp_path.glob("*/model.layers.3.mlp.up_proj.weight.dat"))
    model = weakref.ref(side._model)
    side.close()
    assert model() is None and not list(tmp_path.iterdir())
    forgotten = Accelerate(path, device="cpu", budget=budget)
    assert list(tmp_path.iterdir())
    del forgotten
    assert not list(tmp_path.iterdir())


def test_unknown_device(path):
    with pytest.raises(InputError, match="unknown device"):
        Accelerate(path, device="tpu", budget=1)
