"""Activations against their formulas, and found by name when transformers loads a checkpoint."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM

from hotcold.errors import UnsupportedError
from hotcold.model.activation_names import parse
from hotcold.model.activations import make_activation
from hotcold.model.checkpoint import activation_name, ffn_layers
from hotcold.model.hooks import recorded_intermediates
from hotcold.sparsify.activations import set_activation

ALL = ["relu", "relu2", "drelu", "fatrelu_0.05", "shifted_relu_0.1"]


def act(name, x):
    return make_activation(*parse(name))(x)


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
    assert torch.equal(make_activation("fatrelu", least * 0.999)(x), functional.relu(x))
    fired = x >= t
    kept = make_activation("fatrelu", t)(x)
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
    formula = {
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


LOAD = """
import sys
{first}
{second}
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(model(torch.arange(9)[None]).logits[0, -1, :3].tolist())
"""


@pytest.mark.parametrize("name", ["fatrelu_0.05", "drelu"])
@pytest.mark.parametrize("hotcold_first", [True, False])
def test_a_saved_model_loads_by_name_after_import_hotcold(dense, tmp_path, name, hotcold_first):
    set_activation(dense, name)
    dense.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_act"] == name
    lines = ["import hotcold", "from transformers import AutoModelForCausalLM"]
    first, second = lines if hotcold_first else lines[::-1]
    code = LOAD.format(first=first, second=second)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    expected = dense(torch.arange(9)[None]).logits[0, -1, :3].tolist()
    assert json.loads(done.stdout) == pytest.approx(expected, rel=1e-4)


def test_names_of_transformers_still_mean_what_they_did(dense, tmp_path):
    dense.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.randn(5)
    torch.testing.assert_close(model.model.layers[0].mlp.act_fn(x), functional.silu(x))
