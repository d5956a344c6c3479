"""The head: a matrix of its own, the embedding, or a copy of it, which takes no memory of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hotcold.files.gguf import GGUFFile
from hotcold.model.spec import ModelSpec
from hotcold.model.weights import end_names
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.gpu.weights import read_weights
from hotcold.runtime.placement import problem as plan
from hotcold.runtime.placement.plan import Costs
from hotcold.runtime.placement.problem import part_bytes

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def head_name(file):
    return end_names(file)[1]


@pytest.fixture
def sparse(bundle):
    """A tied model in PowerInfer's form, which has a head that is a copy."""
    return GGUFFile(file_of_role(bundle.path, "sparse"))


@pytest.fixture
def untied(bundle):
    """The same with one other weight in the head."""
    file = GGUFFile(file_of_role(bundle.path, "sparse"))
    head = np.array(file.tensors[HEAD].data)
    head.reshape(-1)[-1] ^= 1
    file.tensors[HEAD] = replace(file.tensors[HEAD], data=head)
    return file


def test_names(bundle, sparse, untied):
    assert HEAD in sparse.tensors and head_name(sparse) == EMBEDDING
    dense = GGUFFile(file_of_role(bundle.path, "dense"))
    assert HEAD not in dense.tensors and head_name(dense) == EMBEDDING
    assert head_name(untied) == HEAD


def test_a_copy_takes_no_memory(sparse, untied):
    one, two = (read_weights(file, torch.device("cpu")) for file in (sparse, untied))
    assert one.head is one.embedding and two.head is not two.embedding
    more = sparse.tensors[HEAD].data.nbytes
    assert two.nbytes - one.nbytes == more
    planned = [
        plan._fixed(file, one.shape, 8, head_name(file)).on(first=True, last=True)
        for file in (sparse, untied)
    ]
    assert planned[1] - planned[0] == more
    assert part_bytes(sparse) == part_bytes(untied) and part_bytes(sparse)["head"] == more


def test_only_a_hybrid_model_leaves_its_embedding_in_main_memory(make_bundle):
    file = GGUFFile(file_of_role(make_bundle(tied=False).path, "sparse"))
    costs, size = Costs(1e9, 1e8, 1e-5, 2e-6), file.tensors[EMBEDDING].data.nbytes
    hybrid = plan.make_problem(file, None, mode="exact", n_ctx=8, budgets=[1 << 30], costs=costs).fixed
    alone = plan._fixed(file, ModelSpec.from_gguf(file), 8, head_name(file))
    assert alone.first - hybrid.first == size and alone.last == hybrid.last >= size
