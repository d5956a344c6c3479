"""llama.cpp as a peer: the same interface as our own engine, on llama-cpp-python's low-level calls.

The low-level API is used because it alone separates computing from everything around it: `seconds` grows by
the time spent in `llama_decode` and by nothing else, so no tokenisation, sampling or Python is held against
llama.cpp. A block of a prompt goes into one call, as `llama-bench` does it.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from hotcold.errors import HotcoldError, InputError, UnsupportedError
from hotcold.files.gguf_split import open_gguf
from hotcold.files.quantize import FLOATS
from hotcold.model.limits import check_tokens
from hotcold.model.tensors import GGUF
from hotcold.progress import log
from hotcold.runtime.context import check_positions

__all__ = ["LlamaCpp", "without_amx"]

_BATCH = 512  # tokens per call: llama.cpp's default micro-batch, which bounds the logits buffer
_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR

# What a process of its own does to find out whether llama.cpp survives its own AMX code. Tiles are for
# blocks, so that one token would not tell.
_PROBE = """import sys
from hotcold.eval.peers.llama_cpp import LlamaCpp
LlamaCpp(sys.argv[1], n_threads=1, n_ctx=64, amx=True).prefill([0] * 32)
"""

_amx_fails: bool | None = None  # known from the first quantized model on
_errors: list[str] = []  # what llama.cpp said last at error level, quoted when a load fails
_log_callback: object = None  # kept alive: llama.cpp holds a bare pointer to it


def _library() -> ModuleType:
    """Import llama-cpp-python's C API and turn its stderr off, once."""
    global _log_callback
    try:
        from llama_cpp import llama_cpp as library
    except ImportError as error:
        raise UnsupportedError(
            "llama.cpp is not installed", fix="install it with `pip install 'hotcold[bench]'`"
        ) from error
    if _log_callback is None:

        def remember(level: int, text: bytes, _: object) -> None:
            if level == _LOG_ERROR:
                _errors.append(text.decode("utf-8", "replace").strip())

        _log_callback = library.llama_log_callback(remember)
        library.llama_log_set(_log_callback, ctypes.c_void_p(0))
        library.llama_backend_init()
    return library


def without_amx() -> bool:
    """Whether this build's AMX code does not work, so that models were loaded without it."""
    return bool(_amx_fails)


def _uses_amx(path: Path, library: ModuleType) -> bool:
    """Whether a model may be loaded for AMX, where the CPU has it.

    GCC 12 drops the configuration of the tiles (in its header only 8 bytes of it are an operand of
    `ldtilecfg`), and llama.cpp then ends the whole process with an illegal instruction.
    """
    global _amx_fails
    if b"AMX_INT8 = 1" not in library.llama_print_system_info():
        return True
    try:
        quantized = {tensor.type for tensor in open_gguf(path).tensors.values()} - set(FLOATS)
    except HotcoldError:  # llama.cpp will say what it is
        return True
    if not quantized:
        return True
    if _amx_fails is None:
        command = [sys.executable, "-c", _PROBE, str(path)]
        _amx_fails = subprocess.run(command, capture_output=True).returncode == -signal.SIGILL
        if _amx_fails:
            fix = "build it with Clang: CC=clang CXX=clang++ pip install --force-reinstall llama-cpp-python"
            log(f"llama.cpp's AMX code fails here; running without AMX and without repacking; {fix}")
    return not _amx_fails


class LlamaCpp:
    """A GGUF model in llama.cpp, on the CPU, or with its last `n_gpu_layers` layers on a GPU.

    `seconds` is the time spent in `llama_decode` since `reset()`. Logits are float32.
    Raises UnsupportedError where llama-cpp-python is missing or refuses the model, InputError where there is
    no such file or the context is full.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_threads: int,
        n_ctx: int = 2048,
        n_gpu_layers: int = 0,
        amx: bool | None = None,
    ) -> None:
        """`amx`: None lets llama.cpp use AMX, and its other repacked forms of weights, if its build can."""
        self._lib = _library()
        if n_gpu_layers and not self._lib.llama_supports_gpu_offload():
            raise UnsupportedError(
                "this llama.cpp was built without GPU support", fix="remove llama.cpp from --backends"
            )
        self._n_gpu_layers = n_gpu_layers
        self.path, self.n_ctx, self.n_threads = Path(path), n_ctx, n_threads
        if not self.path.is_file():
            raise InputError("no such file", where=self.path, expected="a GGUF model")
        model = self._load_model(_uses_amx(self.path, self._lib) if amx is None else amx)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(model))
        self._context = self._make_context(model)
        self._batch = self._lib.llama_batch_init(_BATCH, 0, 1)
        self._memory = self._lib.llama_get_memory(self._context)
        self._close = weakref.finalize(self, _free, self._lib, self._batch, self._context, model)
        self.position, self.seconds = 0, 0.0

    def _load_model(self, amx: bool) -> object:
        parameters = self._lib.llama_model_default_params()
        parameters.use_extra_bufts = amx
        parameters.n_gpu_layers = self._n_gpu_layers
        _errors.clear()
        model = self._lib.llama_model_load_from_file(str(self.path).encode(), parameters)
        if not model:
            reason = f": {_errors[0]}" if _errors else ""
            raise UnsupportedError(f"llama.cpp cannot load this model{reason}", where=self.path)
        return model

    def _make_context(self, model: object) -> object:
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = self.n_ctx
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_threads = parameters.n_threads_batch = self.n_threads
        try:  # llama.cpp itself would abort the process at the first token beyond its positions
            if learned := open_gguf(self.path).tensors.get(f"{GGUF['positions']}.weight"):
                check_positions(learned.shape[0], self.n_ctx, self.path)
        except HotcoldError:
            self._lib.llama_model_free(model)
            raise
        context = self._lib.llama_init_from_model(model, parameters)
        if not context:
            self._lib.llama_model_free(model)
            raise UnsupportedError(
                "llama.cpp cannot create a context", where=self.path, got=f"{self.n_ctx} positions"
            )
        return context

    def reset(self) -> None:
        """Forget the sequence, and set the stopwatch to zero."""
        self._lib.llama_memory_clear(self._memory, False)
        self.position, self.seconds = 0, 0.0

    def prefill(self, ids: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Process a block; returns logits float32 [n_vocab] after the last token, or [len(ids), n_vocab]."""
        ids = np.asarray(ids, dtype=np.int32)
        check_tokens(ids, self.position, self.n_ctx, self.n_vocab)
        blocks = [ids[at : at + _BATCH] for at in range(0, len(ids), _BATCH)]
        logits = [self._decode(block, every=all_logits) for block in blocks]
        return np.concatenate(logits) if all_logits else logits[-1][0]

    def decode(self, token: int) -> np.ndarray:
        """Process one token; returns logits float32 [n_vocab]."""
        return self.prefill([token])

    def _decode(self, ids: np.ndarray, *, every: bool) -> np.ndarray:
        """One `llama_decode`; logits [len(ids) if every else 1, n_vocab]."""
        n = len(ids)
        self._fill_batch(ids, every)
        start = time.perf_counter()
        status = self._lib.llama_decode(self._context, self._batch)
        self._lib.llama_synchronize(self._context)
        self.seconds += time.perf_counter() - start
        if status != 0:
            raise UnsupportedError("llama_decode failed", where=self.path, got=f"status {status}", expected=0)
        self.position += n
        rows = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(rows, shape=(n if every else 1, self.n_vocab)).copy()

    def _fill_batch(self, ids: np.ndarray, every: bool) -> None:
        n, batch = len(ids), self._batch
        batch.n_tokens = n
        np.ctypeslib.as_array(batch.token, shape=(n,))[:] = ids
        np.ctypeslib.as_array(batch.pos, shape=(n,))[:] = np.arange(self.position, self.position + n)
        for index in range(n):
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = every or index == n - 1

    def close(self) -> None:
        """Free the model and its cache; the object is of no use afterwards."""
        self._close()


def _free(library: ModuleType, batch: object, context: object, model: object) -> None:
    library.llama_batch_free(batch)
    library.llama_free(context)
    library.llama_model_free(model)
