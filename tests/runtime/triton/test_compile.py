"""The kernels go through Triton's real compiler for an NVIDIA target, which needs no GPU.

In a process of its own: this one has Triton's interpreter, which replaces the compiler at import.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import re
import subprocess
import sys
import tempfile
from pathlib import Path
import triton
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import torch
from hotcold.runtime.triton import kernels, step_kernels, tuning

GPU = torch.device("cuda")

WEIGHTS = {0: "*bf16", 1: "*i8", 2: "*u8"}
FLAGS = {"SCORED": False, "CLIP": True, "RELU": True, "ALWAYS": True, "CHUNK": 1024, "CHUNKS": 16}
FLAGS |= {"COUNTED": True, "BIASED": False, "GATED": True, "ADD": True, "SHARE": 256, "SPLITS": 16}
FLAGS |= {"VALUE": 0, "SCORE": 1, "OWN": False, "WIDTH": 5120, "PARTS": 64, "BLOCK": 128}

EVEN = "n size width head_dim half n_ctx rows".split()  # multiples of 16 in any model
STEPS = "added least weight bias total normed q k v cos sin turned logs pieces".split()

def signature(kernel, kind, constants):
    types = {name: "i32" for name in kernel.arg_names}
    types |= {name: "*fp32" for name in ("x", "out", "a", "partial", "y", "scores", "each", *STEPS)}
    types |= {name: WEIGHTS[kind] for name in ("w", "up", "gate", "down")}
    types |= {name: "*fp16" for name in ("scales", "gate_scales", "up_scales")}
    types |= {name: "*i32" for name in ("index", "count", "counts")}
    types |= {name: "*i64" for name in ("fired", "counter", "kept", "positions")}
    types |= {name: "*fp16" for name in ("keys", "values")}
    types |= {name: "fp32" for name in ("threshold", "eps", "scale")}
    types |= {"always": "*u8"} | dict.fromkeys(constants, "constexpr")
    return {name: types[name] for name in kernel.arg_names}

def build(name, kind, tiles, tokens, capability, types=(), **flags):
    kernel = getattr(kernels, name + "_kernel", None) or getattr(step_kernels, name + "_kernel")
    first = tiles == tuning.CANDIDATES.get(name, [tiles])[0]
    tiles = tuning.whole_rows(tiles, FLAGS["WIDTH"], GPU) if "EACH" in tiles else tiles
    every = FLAGS | flags | tiles | {"TOKENS": tokens} | dict.fromkeys(("KIND", "KIND_GATE", "KIND_UP"), kind)
    every["EARLY"] = capability >= 90
    every |= {"tokens": 1} if tokens == 1 else {}  # as Triton takes an argument that is 1
    constants = {key: every[key] for key in kernel.arg_names if key in every}
    types = signature(kernel, kind, constants) | dict(types)
    aligned = [text[0] == "*" or (text, name in EVEN) == ("i32", True) for name, text in types.items()]
    attributes = {(i,): [["tt.divisibility", 16]] for i, is_so in enumerate(aligned) if is_so}
    source = ASTSource(kernel, types, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    built = compile(source, target=target, options={"num_warps": tiles["num_warps"]})
    assert built.asm["cubin"]
    check_start(name, built.asm["ptx"], capability)
    if name in ("dot", "listed", "down") and tokens == 1:
        # Nothing is exchanged between threads but sums and scales.
        assert built.asm["ptx"].count("bar.sync") <= 12, (name, kind, tiles)
    if first and tokens == 1:
        assert stack_bytes(built.asm["cubin"]) == 0, (name, kind, tiles)
    print(name, kind, tiles, tokens, capability, flush=True)

def stack_bytes(cubin):  # what does not fit the registers
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return int(re.search(r"STACK:(\\d+)", told.stdout + told.stderr)[1])

def check_start(name, ptx, capability):
    if capability < 90:
        assert "griddepcontrol" not in ptx
        return
    before, after = ptx.split("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in before
    early = name in ("dot", "norm")  # these read weights ahead of what is computed before them
    assert ("ld.global" in before) == early, name
    assert "st.global" not in before and "ld.global" in after

def step(name, **constants):
    floats = {"gate": "*fp32", "up": "*fp32"} if name == "activate" else {}
    build(name, 0, {"num_warps": 4} | constants, 1, capability, floats)

every_candidate, capability = sys.argv[1] == "every", int(sys.argv[2])
for name, candidates in tuning.CANDIDATES.items():
    for tiles in candidates if every_candidate else candidates[:1]:
        for kind in WEIGHTS:
            for tokens in (1, 8) if every_candidate else (1,):
                build(name, kind, tiles, tokens, capability)
for kind in WEIGHTS:  # as OPT has them, a bias everywhere and no gates
    build("dot", kind, tuning.CANDIDATES["dot"][0], 1, capability, BIASED=True)
    build("listed", kind, tuning.CANDIDATES["listed"][0], 1, capability, BIASED=True, GATED=False)
for name, tiles in {"count": {}, "list": {}, "sum": {"BLOCK": 32}}.items():
    build(name, 0, tiles | {"num_warps": 4}, 1, capability)
for name in ("apply_rope", "blend", "activate", "leave_out"):
    step(name)
step("activate", GATED=False)
step("activate", VALUE=4, SCORE=2, OWN=True)  # GELU by its magnitude, a threshold for each neuron
for kind in WEIGHTS:
    build("listed", kind, tuning.CANDIDATES["listed"][0], 1, capability, VALUE=3, SCORE=2, OWN=True)
for add in (False, True):
    for biased in (False, True):
        step("norm", ADD=add, BIASED=biased, BLOCK=4096)
for split in (False, True):
    step("attend", SPLIT=split, num_warps=16)
"""


def compiled(which: str, capability: int) -> int:
    """How many kernels were built for a compute capability."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, which, str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return len(done.stdout.splitlines())


def test_kernels_compile_for_hopper():
    assert compiled("first", 90) == 5 * 3 + 3 * 3 + 3 + 12


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_candidate_compiles(capability):
    assert compiled("every", capability) > 100
