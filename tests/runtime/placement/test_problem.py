"""What a plan says that weights take, and what they take, in every type that a file may hold them in."""

import numpy as np
import pytest
import torch

from hotcold.files.gguf import GGUFFile
from hotcold.model.weights import KEPT
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.cpu.kept_types import kept_bytes
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.gpu.weights import read_weights
from hotcold.runtime.placement.plan import Costs
from hotcold.runtime.placement.problem import make_problem, part_bytes

N_CTX, IDS = 8, [1, 7, 250, 33]
TYPES = [*KEPT, "Q4_1", "Q5_0", "Q5_1"]


@pytest.fixture(params=TYPES)
def sparse_file(make_bundle, request):
    return GGUFFile(file_of_role(make_bundle(quant=request.param, d_ff=128).path, "sparse"))


def test_layers_take_what_was_planned(sparse_file):
    weights = read_weights(sparse_file, torch.device("cpu"), with_predictors=True)
    costs = Costs(1, 1, 0, 0)
    problem = make_problem(sparse_file, None, mode="predicted", n_ctx=N_CTX, budgets=[0], costs=costs)
    cache = 2 * 2 * weights.shape.n_kv_heads * weights.shape.head_dim * N_CTX
    planned = sum(layer.frame_bytes - cache + layer.ffn_bytes for layer in problem.layers)
    masks = sum(layer.predictor.always.nbytes for layer in weights.layers)
    assert weights.nbytes - masks - weights.embedding.nbytes - weights.output_norm.weight.nbytes == planned
    sizes = part_bytes(sparse_file)
    ffns = [layer.ffn for layer in weights.layers]
    assert sizes["gate"] == sum(ffn.gate.nbytes for ffn in ffns)
    assert sizes["head"] == weights.head.nbytes


def test_types_without_kernels_take_two_bytes_a_weight(make_bundle, capsys):
    path = make_bundle(quant="Q5_0").path
    tensor = GGUFFile(file_of_role(path, "sparse")).tensors["blk.0.ffn_up.weight"]
    assert kept_bytes(tensor) == 2 * 96 * 64 > tensor.data.nbytes
    one = Engine.load(path, "exact", 1)
    assert "no kernels for Q5_0, converted to F16" in capsys.readouterr().err
    other = GpuEngine.load(path, "exact", "cpu", N_CTX)
    assert "no kernels for Q5_0, converted to F16" in capsys.readouterr().err
    np.testing.assert_allclose(one.prefill(IDS), other.prefill(IDS), rtol=0.01, atol=0.01)
