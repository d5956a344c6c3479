"""Activations against their formulas, and that importing hotcold changes nothing in transformers."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hotcold.errors import UnsupportedError
from hotcold.model.checkpoint import activation_name, ffn_layers
from hotcold.model.firing import FiringRule
from hotcold.model.hooks import recorded_intermediates
from hotcold.model.modeling_sparse import MODULES, FATReLU
from hotcold.sparsify.activations import set_activation

ALL = [
    "relu", "relu2", "drelu", "fatrelu_0.05", "shifted_relu_0.1", "thresholded_silu_0.1",
    "thresholded_gelu_0.1", "gate_thresholded_silu_-0.5", "gate_thresholded_gelu_0.2",
]  # fmt: skip


def act(name, x):
    rule = FiringRule.named(name, 1)
    return MODULES[rule.name](*(rule.thresholds if rule.rule.letter else ()))(x)


def test_formulas():
    x = torch.tensor([-1.0, -0.0, 0.0, 0.01, 0.05, 0.0500001, 2.0])
    assert act("fatrelu_0.05", x).tolist() == pytest.approx([0, 0, 0, 0, 0.05, 0.0500001, 2])
    assert act("shifted_relu_0.05", x).tolist() == pytest.approx([0, 0, 0, 0, 0, 1e-7, 1.95], abs=1e-7)
    assert act("relu2", x).tolist() == pytest.approx([0, 0, 0, 1e-4, 0.0025, 0.00250001, 4])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.001, 1))
def test_fatrelu_is_not_a_shift_and_equals_relu_below_the_least_positive_value(seed, t):
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(act("fatrelu_0", x), functional.relu(x))
    least = x[x > 0].min().item()
    assert torch.equal(FATReLU(least * 0.999)(x), functional.relu(x))
    fired = x >= t
    kept = FATReLU(t)(x)
    assert torch.equal(kept[fired], x[fired])
    assert not kept[~fired].any()
    if fired.any():
        assert not torch.equal(kept, functional.relu(x - t))


def test_sparsity_rises_with_the_threshold(dense):
    ids, shares = torch.randint(0, 400, (2, 32)), []
    for t in (0, 0.01, 0.1, 0.3, 1.0):
        set_activation(dense, f"fatrelu_{t}")
        with torch.no_grad(), recorded_intermediates(dense) as seen:
            dense(ids)
        shares.append(float((seen[0] == 0).float().mean()))
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


@pytest.mark.parametrize("name", ALL)
def test_the_ffn_computes_the_formula(dense, name):
    set_activation(dense, name)
    layer, x = ffn_layers(dense)[1], torch.randn(3, 32)
    gate, up = layer.gate(x), layer.up(x)
    silu, gelu = gate * torch.sigmoid(gate), gate * (1 + torch.erf(gate / 2**0.5)) / 2
    formula = {
        "thresholded_silu_0.1": lambda: torch.where(silu.abs() >= 0.1, silu, 0) * up,
        "thresholded_gelu_0.1": lambda: torch.where(gelu.abs() >= 0.1, gelu, 0) * up,
        "gate_thresholded_silu_-0.5": lambda: torch.where(gate >= -0.5, silu, 0) * up,
        "gate_thresholded_gelu_0.2": lambda: torch.where(gate >= 0.2, gelu, 0) * up,
        "relu": lambda: functional.relu(gate) * up,
        "relu2": lambda: functional.relu(gate) ** 2 * up,
        "drelu": lambda: functional.relu(gate) * functional.relu(up),
        "fatrelu_0.05": lambda: torch.where(gate >= 0.05, gate, 0) * up,
        "shifted_relu_0.1": lambda: functional.relu(gate - 0.1) * up,
    }[name]
    torch.testing.assert_close(layer.mlp(x), layer.down(formula()))
    assert activation_name(dense) == name


@pytest.mark.parametrize("name", ALL)
def test_leaving_out_what_does_not_fire_changes_nothing(dense, name):
    """Lossless in float64: rows of up and columns of down of silent neurons are not needed."""
    set_activation(dense.double(), name)
    layer, x = ffn_layers(dense)[0], torch.randn(32, dtype=torch.float64)
    gate = layer.activation(layer.gate(x))
    fired = gate.nonzero().flatten()
    assert 0 < len(fired) < 64
    up = layer.up.weight[fired] @ x
    up = functional.relu(up) if name == "drelu" else up
    sparse = layer.down.weight[:, fired] @ (gate[fired] * up)
    torch.testing.assert_close(sparse, layer.mlp(x), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["swish", "fatrelu", "fatrelu_-1", "fatrelu_x", "shifted_relu"])
def test_unknown_activation_leaves_the_model_alone(dense, name):
    with pytest.raises(UnsupportedError, match=r"unknown activation .*relu \| relu2 \| drelu \| fatrelu_T"):
        set_activation(dense, name)
    assert activation_name(dense) == "silu"


def test_importing_hotcold_changes_nothing_in_transformers():
    """Neither the table of activations, nor an FFN, nor what is imported."""
    code = """
import sys
import hotcold
assert "transformers" not in sys.modules and "torch" not in sys.modules
assert not [finder for finder in sys.meta_path if "hotcold.model" in type(finder).__module__]
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP
assert type(ACT2FN).__module__ == "transformers.activations"
assert LlamaMLP.forward.__module__ == LlamaMLP.__module__
for name in ("drelu", "fatrelu_0.01", "thresholded_silu_0.1"):
    assert name not in ACT2FN
    try:
        ACT2FN[name]
    except KeyError:
        continue
    raise SystemExit(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_transformers_still_mean_what_they_did(dense, tmp_path):
    dense.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.randn(5)
    torch.testing.assert_close(model.model.layers[0].mlp.act_fn(x), functional.silu(x))
