"""A checkpoint with an activation that transformers lacks can be loaded without hotcold."""

import json
import runpy
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hotcold.model import checkpoint
from hotcold.model.ffn_modules import GATED, set_firing
from hotcold.model.firing import FiringRule
from hotcold.model.standalone import standalone_files
from hotcold.sparsify.activations import set_activation

LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from modeling_sparse import SparseLlamaForCausalLM
model = SparseLlamaForCausalLM.from_pretrained(sys.argv[1])
assert "hotcold" not in sys.modules
print(model.config.hidden_act)
print(model(torch.arange(9)[None]).logits[0, -1, :3].tolist())
"""


@pytest.mark.parametrize("name", ["fatrelu_0.05", "shifted_relu_0.1", "drelu", "thresholded_silu_0.1"])
def test_the_modeling_file_gives_the_models_function(dense, tokenizer, tmp_path, name):
    set_activation(dense, name)
    folder = tmp_path / "model"
    checkpoint.save(dense, tokenizer, folder, files=standalone_files(dense))
    command = [sys.executable, "-I", "-c", LOAD, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    expected = dense(torch.arange(9)[None]).logits[0, -1, :3].tolist()
    assert lines[0] == name
    assert json.loads(lines[1]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("model_type", GATED)
def test_training_loading_and_the_file_are_one_function(tokenizer, tmp_path, model_type):
    """dReLU of every family that can have it: the module that is trained, the checkpoint that is loaded."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    ids = torch.randint(0, 400, (1, 24))
    plain = model(ids).logits
    set_activation(model, "drelu")
    trained = model(ids).logits
    assert not torch.allclose(trained, plain, atol=1e-2)
    folder = tmp_path / "model"
    checkpoint.save(model, tokenizer, folder, files=standalone_files(model))
    torch.testing.assert_close(checkpoint.load_model(str(folder)).eval()(ids).logits, trained)
    file = runpy.run_path(str(folder / "modeling_sparse.py"))
    alone = file[f"Sparse{type(model).__name__}"].from_pretrained(folder).eval()
    torch.testing.assert_close(alone(ids).logits, trained)


@pytest.mark.parametrize("each", [False, True], ids=["per-layer", "per-neuron"])
def test_thresholds_of_layers_and_neurons(dense, tokenizer, tmp_path, each):
    """The modeling file reads them as load_model does; half precision does not round them."""
    spread = torch.linspace(0.01, 0.3, 64).tolist()
    rule = FiringRule("thresholded_silu", (tuple(spread), tuple(spread[::-1])) if each else (0.05, 0.2))
    ids = torch.randint(0, 400, (1, 24))
    expected = set_firing(dense, rule)(ids).logits
    folder = tmp_path / "model"
    checkpoint.save(dense, tokenizer, folder, files=standalone_files(dense))
    loaded = checkpoint.load_model(str(folder))
    torch.testing.assert_close(loaded(ids).logits, expected)
    file = runpy.run_path(str(folder / "modeling_sparse.py"))
    alone = file["SparseLlamaForCausalLM"].from_pretrained(folder).eval()
    torch.testing.assert_close(alone(ids).logits, expected)
    half = checkpoint.load_model(str(folder), "bfloat16").model.layers[0].mlp.act_fn
    assert half.threshold == loaded.model.layers[0].mlp.act_fn.threshold


def test_relu_needs_no_file(dense):
    set_activation(dense, "relu")
    assert standalone_files(dense) == {}
