"""llama.cpp's options that hotcold does not have, so that its command lines can be pasted.

An option that only affects speed, memory, or the log is ignored, and one line says so and what to use
instead. An option that would change the text is refused, since ignoring it would be a silent lie, unless its
value is what hotcold does anyway.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from hotcold.progress import log

__all__ = ["add_llama_options"]

_FLAG, _VALUE, _MAYBE = 0, None, "?"  # argparse's nargs
_GPU = "use `run --backend gpu` or `--backend hybrid` for a GPU"
_DEVICES = "use `run --device` and `--vram-budget` to assign layers to GPUs"
_BLOCKS = "hotcold chooses the batch size of the prompt"
_MEMORY = "weights are packed into memory once, and no file stays mapped"
_KERNELS = "there is only one attention kernel"
_CPUS = "use `taskset` to choose CPUs"
_OTHER = "hotcold has no such setting"
_LOG = "statistics go to stderr; use --no-display-prompt to omit the prompt"
_SHIFT = "the context does not shift; generation stops when it is full"
_CHAT = "only --chat uses the model's chat template"

# names, arguments, what is said
_IGNORED: list[tuple[str, Any, str]] = [
    ("-ngl --gpu-layers --n-gpu-layers", _VALUE, _GPU),
    ("-sm --split-mode", _VALUE, _DEVICES),
    ("-ts --tensor-split", _VALUE, _DEVICES),
    ("-mg --main-gpu", _VALUE, _DEVICES),
    ("-nkvo --no-kv-offload", _FLAG, _GPU),
    ("-ot --override-tensor", _VALUE, _DEVICES),
    ("-cmoe --cpu-moe", _FLAG, _OTHER),
    ("-ncmoe --n-cpu-moe", _VALUE, _OTHER),
    ("-b --batch-size", _VALUE, _BLOCKS),
    ("-ub --ubatch-size", _VALUE, _BLOCKS),
    ("-fa --flash-attn", _MAYBE, _KERNELS),
    ("--mlock", _FLAG, _MEMORY),
    ("--no-mmap", _FLAG, _MEMORY),
    ("--mmap", _FLAG, _MEMORY),
    ("-tb --threads-batch", _VALUE, "-t sets the threads for prompt and generation"),
    ("-C --cpu-mask", _VALUE, _CPUS),
    ("-Cr --cpu-range", _VALUE, _CPUS),
    ("--cpu-strict", _VALUE, _CPUS),
    ("--numa", _VALUE, "use `numactl` to place memory"),
    ("--prio", _VALUE, "use `nice` to set priorities"),
    ("--poll", _VALUE, _OTHER),
    ("--no-repack -nr", _FLAG, _MEMORY),
    ("--check-tensors", _FLAG, "weights are always checked"),
    ("--no-warmup", _FLAG, _OTHER),
    ("--warmup", _FLAG, _OTHER),
]
_IGNORED_IN_RUN: list[tuple[str, Any, str]] = [
    ("--keep", _VALUE, _SHIFT),
    ("--no-context-shift", _FLAG, _SHIFT),
    ("-dt --defrag-thold", _VALUE, _OTHER),
    ("-np --parallel", _VALUE, "one text is generated at a time"),
    ("-cb --cont-batching", _FLAG, "one text is generated at a time"),
    ("--color", _FLAG, _LOG),
    ("--simple-io", _FLAG, _LOG),
    ("-v --verbose", _FLAG, _LOG),
    ("--verbose-prompt", _FLAG, _LOG),
    ("--log-disable", _FLAG, _LOG),
    ("--no-perf", _FLAG, _LOG),
    ("--prompt-cache", _VALUE, "the prompt is computed each time"),
    ("--prompt-cache-all", _FLAG, "the prompt is computed each time"),
    ("-no-cnv --no-conversation", _FLAG, _CHAT),
    ("-st --single-turn", _FLAG, _CHAT),
    ("--jinja", _FLAG, _CHAT),
    ("--reset-gpu-index", _FLAG, "--place takes a plan, and without it a new one is made"),
    ("--disable-gpu-index", _FLAG, "--place takes a plan, and without it a new one is made"),
]

# names, arguments, the value that changes nothing if there is one, what is said
_REFUSED: list[tuple[str, Any, str | None, str]] = [
    ("-ctk --cache-type-k", _VALUE, "f16", "keys are kept as f16"),
    ("-ctv --cache-type-v", _VALUE, "f16", "values are kept as f16"),
    ("--rope-scaling", _VALUE, None, "positions are as the model says"),
    ("--rope-scale", _VALUE, None, "positions are as the model says"),
    ("--rope-freq-base", _VALUE, "0", "positions are as the model says"),
    ("--rope-freq-scale", _VALUE, "0", "positions are as the model says"),
    ("--yarn-orig-ctx", _VALUE, "0", "positions are as the model says"),
    ("--yarn-ext-factor", _VALUE, "-1", "positions are as the model says"),
    ("--yarn-attn-factor", _VALUE, "-1", "positions are as the model says"),
    ("--yarn-beta-slow", _VALUE, "-1", "positions are as the model says"),
    ("--yarn-beta-fast", _VALUE, "-1", "positions are as the model says"),
    ("-gan --grp-attn-n", _VALUE, "1", "positions are as the model says"),
    ("-gaw --grp-attn-w", _VALUE, "512", "positions are as the model says"),
    ("--override-kv", _VALUE, None, "metadata comes from the file"),
    ("--lora", _VALUE, None, "adapters are not applied: merge them first"),
    ("--lora-scaled", _VALUE, None, "adapters are not applied: merge them first"),
    ("--control-vector", _VALUE, None, "control vectors are not applied"),
]
_SAMPLER = "hotcold has no such sampler"
_REFUSED_IN_RUN: list[tuple[str, Any, str | None, str]] = [
    ("--mirostat", _VALUE, "0", _SAMPLER),
    ("--mirostat-lr", _VALUE, None, _SAMPLER),
    ("--mirostat-ent", _VALUE, None, _SAMPLER),
    ("--typical", _VALUE, "1", _SAMPLER),
    ("--top-nsigma --top-n-sigma", _VALUE, "-1", _SAMPLER),
    ("--xtc-probability", _VALUE, "0", _SAMPLER),
    ("--xtc-threshold", _VALUE, "0.1", _SAMPLER),
    ("--dry-multiplier", _VALUE, "0", _SAMPLER),
    ("--dynatemp-range", _VALUE, "0", _SAMPLER),
    ("--presence-penalty", _VALUE, "0", _SAMPLER),
    ("--frequency-penalty", _VALUE, "0", _SAMPLER),
    ("--samplers", _VALUE, None, "the order of samplers is fixed, and llama.cpp's"),
    ("--sampling-seq --sampler-seq", _VALUE, None, "the order of samplers is fixed, and llama.cpp's"),
    ("-l --logit-bias", _VALUE, None, _SAMPLER),
    ("--grammar", _VALUE, None, "grammars are not offered"),
    ("--grammar-file", _VALUE, None, "grammars are not offered"),
    ("-j --json-schema", _VALUE, None, "grammars are not offered"),
    ("-r --reverse-prompt", _VALUE, None, "only end-of-text tokens stop generation"),
    ("-sp --special", _FLAG, None, "special tokens are not printed"),
    ("-sys --system-prompt", _VALUE, None, "--chat sends only the prompt"),
    ("--chat-template", _VALUE, None, "--chat takes the model's own template"),
    ("--chat-template-file", _VALUE, None, "--chat takes the model's own template"),
    ("--in-prefix", _VALUE, None, "the prompt is -p or -f alone"),
    ("--in-suffix", _VALUE, None, "the prompt is -p or -f alone"),
    ("-i --interactive", _FLAG, None, "one prompt is answered, and that is all"),
    ("-if --interactive-first", _FLAG, None, "one prompt is answered, and that is all"),
    ("--context-shift", _FLAG, None, _SHIFT),
]


class _Ignored(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, why: str, **more: Any) -> None:
        super().__init__(option_strings, dest, **more)
        self._why = why

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        log(f"{option_string} is ignored: {self._why}")


class _Refused(argparse.Action):
    def __init__(
        self, option_strings: Sequence[str], dest: str, neutral: str | None, why: str, **more: Any
    ) -> None:
        super().__init__(option_strings, dest, **more)
        self._neutral, self._why = neutral, why

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        if self._neutral is None or not _equal(values, self._neutral):
            parser.error(f"{option_string} is a llama.cpp option that would change the text: {self._why}")


def _equal(value: str, neutral: str) -> bool:
    try:
        return float(value) == float(neutral)
    except ValueError:
        return value == neutral


def add_llama_options(parser: argparse.ArgumentParser, *, generates: bool = False) -> None:
    """Accept llama.cpp's options beside a command's own, hidden from its help; `generates` adds the
    options for generating text."""
    for names, nargs, why in _IGNORED + (_IGNORED_IN_RUN if generates else []):
        _add(parser, names, nargs, action=_Ignored, why=why)
    for names, nargs, neutral, why in _REFUSED + (_REFUSED_IN_RUN if generates else []):
        _add(parser, names, nargs, action=_Refused, neutral=neutral, why=why)


def _add(parser: argparse.ArgumentParser, names: str, nargs: Any, **more: Any) -> None:
    switch = {"choices": ("on", "off", "auto", "1", "0")} if nargs == _MAYBE else {}
    parser.add_argument(
        *names.split(), nargs=nargs, dest=argparse.SUPPRESS, help=argparse.SUPPRESS, **switch, **more
    )
