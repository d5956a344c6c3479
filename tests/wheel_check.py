"""What an installed wheel does on a machine without a compiler: the command, every kind of kernel, a model.

.ci/run runs it with the interpreter of the environment that has the wheel, with an empty `PATH`.
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

from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.model import checkpoint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.engine import CpuEngine as Engine


def main() -> None:
    assert not [tool for tool in ("cc", "gcc", "g++", "clang", "cmake", "ninja") if shutil.which(tool)]
    command = [sys.executable, "-I", Path(sys.executable).with_name("hotcold"), "--help"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        model, bundle = Path(folder, "model"), Path(folder, "bundle")
        write_model(model, FAMILIES["prosparse"])
        fp = checkpoint.fingerprint(str(model))
        export_bundle(HFCheckpoint(model), bundle, name="m", fingerprint=fp, options=ExportOptions("f32"))
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
