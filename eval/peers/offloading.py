"""transformers with accelerate's offloading as a peer: what `device_map="auto"` with `max_memory` gives.

Whole layers stay on the device as far as the budget goes; the weights of the others lie in RAM and are
brought over for every token, one matrix at a time. All computing is the device's. With `cpu` as the device,
files in a temporary folder stand in for RAM, so that a dry run goes through the same hooks.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes
from transformers import DynamicCache, PreTrainedModel

from hotcold.files.gguf_split import open_gguf
from hotcold.model import checkpoint
from hotcold.runtime.gpu.device import open_device

__all__ = ["Accelerate"]

_DTYPES = {"F32": "float32", "F16": "float16"}  # of files in any other type the weights become bfloat16


class Accelerate:
    """A dense GGUF model in transformers, with at most `budget` bytes of its weights on the device.

    `device_bytes` is how many of them stay there. Logits are float32. Raises what `checkpoint.load_model`
    and `open_device` raise.
    """

    def __init__(self, path: str | Path, *, device: str, budget: int) -> None:
        self._device = open_device(device)
        folder = tempfile.TemporaryDirectory(prefix="hotcold-offload-")
        self._remove_folder = weakref.finalize(self, folder.cleanup)
        kind = open_gguf(path).tensors["token_embd.weight"].type
        self._model = checkpoint.load_model(str(path), _DTYPES.get(kind, "bfloat16"))
        place = "cpu" if self._device.type == "cpu" else self._device.index  # as accelerate calls them
        layout, sizes = layout_of(self._model, place, budget), compute_module_sizes(self._model)
        self.device_bytes = sum(sizes[name] for name, at in layout.items() if at == place)
        dispatch_model(
            self._model,
            layout,
            main_device=cast("torch.device", place),  # any name that accelerate has for one
            offload_dir=folder.name,
            skip_keys=cast("list[str] | None", self._model._skip_keys_device_placement),
            force_hooks=self.device_bytes == 0,  # or what is in RAM as a whole would be computed there
        )
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self._cache = DynamicCache(config=self._model.config)

    def prefill(self, ids: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Process a block; returns logits float32 [n_vocab] after the last token, or [len(ids), n_vocab]."""
        logits = self._forward(ids, last=0 if all_logits else 1)
        return logits if all_logits else logits[0]

    def decode(self, token: int) -> np.ndarray:
        """Process one token; returns logits float32 [n_vocab]."""
        return self._forward([token], last=1)[0]

    @torch.inference_mode()
    def _forward(self, ids: Sequence[int] | np.ndarray, last: int) -> np.ndarray:
        """Logits [last, n_vocab] after the last tokens, or with 0 after all of them."""
        block = torch.tensor(np.asarray(ids)[None], dtype=torch.long, device=self._device)
        found = self._model(block, past_key_values=self._cache, use_cache=True, logits_to_keep=last)
        return found.logits[0].float().cpu().numpy()

    def close(self) -> None:
        """Free the model, its cache and its files; the object is of no use afterwards."""
        del self._model, self._cache
        gc.collect()  # accelerate's hooks and their modules know each other
        self._remove_folder()


def layout_of(model: PreTrainedModel, place: int | str, budget: int) -> dict[str, int | str | torch.device]:
    """Accelerate's device map: module -> `place`, a GPU's number or `cpu`, or where the rest goes.

    The rest goes to RAM, however much it is, and from `cpu` to `disk`. While layers are left over, accelerate
    keeps as much of the budget free as one of them takes, and brings back less, a matrix at a time. A
    benchmark's KV cache fits there too, so nothing more is set aside for it.
    """
    room: dict[int | str, int | str] = {place: budget}
    room.setdefault("cpu", sys.maxsize)
    # Not cleaned up: dispatch_model finds no weights for the "" that a map with one place is cut down to.
    return infer_auto_device_map(
        model, room, no_split_module_classes=list(model._no_split_modules or ()), clean_result=False
    )
