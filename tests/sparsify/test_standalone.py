"""A checkpoint with an activation that transformers lacks can be loaded without hotcold."""

import json
import subprocess
import sys

import pytest
import torch

from hotcold import checkpoint
from hotcold.sparsify.activations import set_activation
from hotcold.sparsify.standalone import standalone_files

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


@pytest.mark.parametrize("name", ["fatrelu_0.05", "shifted_relu_0.1", "drelu"])
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


def test_relu_needs_no_file(dense):
    set_activation(dense, "relu")
    assert standalone_files(dense) == {}
