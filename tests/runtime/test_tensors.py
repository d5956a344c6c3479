"""GGUF files of every family: a tensor too few or too many, renamed or cut, or a value that is no number."""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_families import FAMILIES, IDS, SPARSE

from hotcold.convert.gguf.write import TensorPlan, copied, write_gguf
from hotcold.errors import FormatError, HotcoldError
from hotcold.files.gguf import GGUFFile
from hotcold.model import checkpoint
from hotcold.model.gguf_checkpoint import GGUFCheckpoint
from hotcold.runtime.cpu.engine import CpuEngine as Engine

CHANGES = ("removed", "renamed", "cut", "added")
# Without these a file is another model, which llama.cpp and transformers run: a head is tied then, positions
# are plain, one expert needs no router, and a model has fewer learned positions. PowerInfer's have a head.
FREE = re.compile(r"output\.weight|rope_freqs\.weight|\S*\.ffn_gate_inp\.\S*")
ROUTER = re.compile(r"rope_freqs\.weight|\S*\.ffn_gate_inp\.\S*")
FEWER = re.compile(r"(pos|position)_embd\.weight|rope_freqs\.weight|\S*\.ffn_gate_inp\.\S*")


def rewritten(file: GGUFFile, path: Path, plans: dict[str, TensorPlan]) -> Path:
    exact = {int: np.uint32, float: np.float32}
    metadata = {k: exact.get(type(v), lambda same: same)(v) for k, v in file.metadata.items()}
    write_gguf(path, metadata, list(plans.values()), magic=file.magic)
    return path


def changed(file: GGUFFile, change: str, name: str) -> dict[str, TensorPlan]:
    """The file's tensors with one of them another."""
    plans = {name: copied(tensor) for name, tensor in file.tensors.items()}
    plan, stem = plans[name], name.rpartition(".")[0]
    match change:
        case "removed":
            del plans[name]
        case "renamed":
            plans[name] = replace(plan, name=name.replace(stem, f"{stem}_s"))
        case "cut":
            axis = 1 if "_exps" in name else 0
            shape = tuple(n - (i == axis) for i, n in enumerate(plan.shape))
            size = 4 * int(np.prod(shape))
            plans[name] = replace(plan, shape=shape, load=lambda: np.asarray(file.tensors[name].data)[:size])
        case "added":
            plans["more"] = replace(plan, name=name.replace(stem, f"{stem}_s"))
    return plans


def cases(file: GGUFFile, every: bool, seed: str) -> list[tuple[str, str]]:
    rng = random.Random(zlib.crc32(seed.encode()))
    names = [name for name in file.tensors if not re.search(r"\.fc[12]\.", name)]
    removed = [("removed", name) for name in names if every]
    return removed + [(change, rng.choice(names)) for change in CHANGES for _ in range(2)]


@pytest.mark.parametrize("form", ["m.gguf", "m.powerinfer.gguf"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_engine_needs_every_tensor_and_no_other(name, form, make_bundle_of, tmp_path):
    """Each one removed; a few of the other changes. A hole in one layer is one, whatever the tensor."""
    if form != "m.gguf" and name not in SPARSE:
        pytest.skip("has no sparse form")
    file, mode = GGUFFile(make_bundle_of(name) / form), "dense" if form == "m.gguf" else "exact"
    for change, tensor in cases(file, True, f"{name} {form}"):
        free = FEWER if change == "cut" else FREE if form == "m.gguf" or name == "opt" else ROUTER
        if free.fullmatch(tensor):
            continue
        path = rewritten(file, tmp_path / "m.gguf", changed(file, change, tensor))
        with pytest.raises(HotcoldError) as caught:
            Engine(path, mode, 1, n_ctx=32)
        assert tensor.rpartition(".")[0].removesuffix("_exps") in str(caught.value), (change, tensor)


@pytest.mark.parametrize("change", [*CHANGES, "nan"])
@pytest.mark.parametrize("tensor", ["blk.1.fc1.weight", "blk.0.fc2.weight"])
def test_predictors_are_read_by_the_same_rule(tensor, change, make_bundle_of, tmp_path):
    file = GGUFFile(make_bundle_of("llama") / "m.powerinfer.gguf")
    plans = with_value(file, tensor, np.nan) if change == "nan" else changed(file, change, tensor)
    path = rewritten(file, tmp_path / "m.gguf", plans)
    with pytest.raises(HotcoldError, match=r"blk\.\d\.fc[12]"):
        Engine(path, "predicted", 1, n_ctx=32)


READ_BACK = [
    "llama",
    "llama-biases",
    "bamboo",
    "qwen2-silu",
    "qwen3",
    "granite",
    "minicpm-s",
    "mistral-window",
]


@pytest.mark.parametrize("name", READ_BACK)
def test_a_gguf_file_that_becomes_a_model_needs_every_tensor_and_no_other(name, make_bundle_of, tmp_path):
    """For export, convert and what loads a model to run it in torch; names are Hugging Face's then."""
    file = GGUFFile(make_bundle_of(name) / "m.gguf")
    for change, tensor in cases(file, False, name):
        if FREE.fullmatch(tensor):
            continue
        path = rewritten(file, tmp_path / "m.gguf", changed(file, change, tensor))
        with pytest.raises(HotcoldError, match=r"tensor|layers of this file|two of one name"):
            checkpoint.load_model(str(path))


def with_value(file: GGUFFile, name: str, value: float) -> dict[str, TensorPlan]:
    plans = {name: copied(tensor) for name, tensor in file.tensors.items()}

    def load() -> np.ndarray:
        values = np.array(file.tensors[name].data).view(np.float32)
        values[values.size // 2] = value
        return values

    plans[name] = replace(plans[name], load=load)
    return plans


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "tensor",
    ["token_embd.weight", "output.weight", "output_norm.weight", "blk.1.attn_norm.weight",
     "blk.0.attn_k.weight", "blk.1.ffn_up.weight", "blk.1.ffn_down_t.weight"],
)  # fmt: skip
def test_the_engine_refuses_values_that_are_no_numbers(tensor, value, make_bundle_of, tmp_path):
    file = GGUFFile(make_bundle_of("llama") / "m.powerinfer.gguf")
    path = rewritten(file, tmp_path / "m.gguf", with_value(file, tensor, value))
    message = f"{tensor}: a value is not finite".replace(".", r"\.")
    with pytest.raises(FormatError, match=message):
        Engine(path, "exact", 1, n_ctx=32)
    with pytest.raises(FormatError, match=message):
        checkpoint.load_model(str(path))


@pytest.mark.parametrize("quant", ["Q4_0", "Q8_0", "F16", "BF16"])
def test_the_engine_looks_at_the_scales_of_blocks_too(quant, make_bundle, tmp_path):
    file = GGUFFile(make_bundle(quant=quant).path / "tiny.powerinfer.gguf")
    plans = {name: copied(tensor) for name, tensor in file.tensors.items()}
    name = "blk.1.ffn_down_t.weight"
    data = np.array(file.tensors[name].data)
    data[-2:] = np.uint16([0x7FC0]).view(np.uint8)  # NaN as F16 and as BF16
    if quant.startswith("Q"):
        size = {"Q4_0": 18, "Q8_0": 34}[quant]
        data = np.array(file.tensors[name].data)
        data[-size : 2 - size] = np.uint16([0x7C00]).view(np.uint8)  # the scale of the last block
    plans[name] = replace(plans[name], load=lambda: data)
    path = rewritten(file, tmp_path / "m.gguf", plans)
    with pytest.raises(FormatError, match=rf"ffn_down_t\.weight: a value is not finite in {quant}"):
        Engine(path, "exact", 1, n_ctx=32)
    with pytest.raises(FormatError, match=r"ffn_down_t\.weight: a value is not finite"):
        GGUFCheckpoint(path).load("model.layers.1.mlp.down_proj.weight")


def test_types_without_kernels_must_fit_what_they_become(make_bundle_of, tmp_path):
    """A float64 of 1e6 is a number, and none as F16."""
    file = GGUFFile(make_bundle_of("llama") / "m.gguf")
    name = next(name for name in file.tensors if name.startswith("blk.0.ffn_up"))
    for value, error in ((1e4, None), (1e6, "is not finite in F16")):
        plans = with_value(file, name, value)
        wide = plans[name].load().astype(np.float64)
        plans[name] = replace(plans[name], type="F64", load=lambda wide=wide: wide)
        path = rewritten(file, tmp_path / "m.gguf", plans)
        if error is None:
            Engine(path, "dense", 1, n_ctx=32)
        else:
            with pytest.raises(FormatError, match=error):
                Engine(path, "dense", 1, n_ctx=32)


def test_an_embedding_of_another_length_than_the_file_says(make_bundle_of, tmp_path):
    file = GGUFFile(make_bundle_of("llama-silu-tied") / "m.gguf")
    path = rewritten(file, tmp_path / "m.gguf", changed(file, "cut", "token_embd.weight"))
    for read in (lambda: Engine(path, "dense", 1, n_ctx=32), lambda: checkpoint.load_model(str(path))):
        with pytest.raises(HotcoldError, match=r"tensor token_embd\.weight does not fit the model"):
            read()


def test_a_whole_file_is_read_as_before(make_bundle_of, tmp_path):
    """What the changes above start from."""
    file = GGUFFile(make_bundle_of("qwen2-silu") / "m.gguf")
    path = rewritten(file, tmp_path / "m.gguf", {name: copied(t) for name, t in file.tensors.items()})
    expected = Engine(make_bundle_of("qwen2-silu") / "m.gguf", "dense", 1, n_ctx=32).prefill(IDS)
    np.testing.assert_array_equal(Engine(path, "dense", 1, n_ctx=32).prefill(IDS), expected)
