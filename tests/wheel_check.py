"""What an installed wheel does on a machine without a compiler: the command, every kind of kernel, a model.

Run by .ci/run with the interpreter of the environment that has the wheel, `PATH` empty, outside of the checkout.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

import numpy as np
import torch
from stored_rows import relative_error
from tiny_families import FAMILIES, IDS, write_model

from hotcold.model import checkpoint
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.engine import Engine


def main() -> None:
    assert not [tool for tool in ("cc", "gcc", "g++", "clang", "cmake", "ninja") if shutil.which(tool)]
    hotcold = Path(sys.executable).with_name("hotcold")
    with tempfile.TemporaryDirectory() as folder:
        model, bundle = Path(folder, "model"), Path(folder, "bundle")
        write_model(model, FAMILIES["prosparse"])
        export = [hotcold, "export", model, "--out", bundle, "--quant", "f32"]
        subprocess.run([sys.executable, "-I", *export], check=True)
        plain = checkpoint.load_model(str(model))
        with torch.no_grad():
            expected = plain(torch.from_numpy(IDS)[None]).logits[0].numpy()
        for isa in _cpu.available_isas():
            os.environ["HOTCOLD_CPU_ISA"] = isa
            for mode in ("dense", "exact"):
                engine = Engine.load(bundle, mode, 1, n_ctx=64)
                error = relative_error(engine.prefill(IDS, all_logits=True), np.asarray(expected))
                assert engine.isa == isa and error < 1e-3, (isa, mode, error)
                print(f"{isa}, {mode}: {error:.1e} from transformers")


main()
