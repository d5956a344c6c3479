"""`hotcold run`: generate text from a bundle. Text goes to stdout, what it cost to stderr."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.errors import InputError
from hotcold.progress import log
from hotcold.runtime.backends import BackendOptions, add_backend_arguments, make_placement, open_engine
from hotcold.runtime.generation.llama_options import add_llama_options
from hotcold.runtime.model_argument import add_model_arguments, add_quant_argument, model_path

if TYPE_CHECKING:
    from hotcold.runtime.engine import Engine
    from hotcold.runtime.generation.generate import Generation
    from hotcold.runtime.generation.sampling import Sampler, SamplingParams
    from hotcold.runtime.generation.vocabulary import Vocabulary
    from hotcold.runtime.gpu.engine import GpuEngine
    from hotcold.runtime.stats import Stats

__all__ = ["EXAMPLE", "HELP", "add_arguments", "run"]

HELP = (
    "Generate text. Options have the same names as in llama.cpp. A GGUF file runs as it is; a Hugging Face "
    "model is first converted into a bundle, which is kept in a cache (`hotcold cache`)."
)
EXAMPLE = 'hotcold run --bundle demo/bundle -p "Once upon a time" -n 64 --temp 0'

_INTERRUPTED = 130
_MOST = (1 << 31) - 1
_RANDOM_SEED = (1 << 32) - 1  # what llama.cpp takes for -1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold run`."""
    add_model_arguments(parser)
    add_quant_argument(parser)
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("-p", "--prompt", help=r"text to continue; \n stands for a newline")
    prompt.add_argument("-f", "--file", metavar="FILE", help="read the prompt from a UTF-8 file")
    parser.add_argument("-e", "--escape", action="store_true", default=True, help=argparse.SUPPRESS)
    parser.add_argument("--no-escape", dest="escape", action="store_false", help=r"do not interpret \n in -p")
    parser.add_argument(
        "-cnv", "--chat", action="store_true", help="format the prompt with the model's chat template"
    )
    parser.add_argument(
        "-n",
        "--n-predict",
        type=int,
        default=-1,
        help="tokens to generate; -1: until the text ends (%(default)s)",
    )
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=int,
        default=2048,
        help="context size in tokens; 0: the model's own (%(default)s)",
    )
    parser.add_argument("-t", "--threads", type=int, help="threads (default: all CPUs)")
    modes = ("auto", "predicted", "exact", "dense")
    parser.add_argument(
        "--mode", choices=modes, default="auto",
        help="which neurons to compute: dense: all, exact: those that fire, predicted: those predicted to "
        "fire; auto: whichever is fastest for this model, measured once (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--ignore-eos", action="store_true", help="continue past the end-of-text token")
    parser.add_argument("--no-display-prompt", action="store_true", help="print only the generated text")
    _add_sampling(parser.add_argument_group("sampling"))
    group = parser.add_argument_group("where to compute")
    add_backend_arguments(group)
    group.add_argument("--dry-run", action="store_true", help="hybrid: print the plan and exit")
    add_llama_options(parser, generates=True)


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--temp", type=float, default=0.8, help="temperature; 0: greedy (%(default)s)")
    group.add_argument(
        "--top-k", type=int, default=40, help="keep only the k most likely tokens; 0: all (%(default)s)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=0.95,
        help="keep the most likely tokens up to this total probability; 1: all (%(default)s)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.05,
        help="drop tokens below this fraction of the top probability (%(default)s)",
    )
    group.add_argument(
        "--repeat-penalty",
        type=float,
        default=1.0,
        help="penalty on recently used tokens; 1: none (%(default)s)",
    )
    group.add_argument(
        "--repeat-last-n",
        type=int,
        default=64,
        help="number of recent tokens to penalize; -1: all (%(default)s)",
    )
    group.add_argument(
        "-s", "--seed", type=int, default=-1, help="random seed; -1: a new one each time (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Generate; 0, or 130 after Ctrl-C, with the figures printed in both cases."""
    from hotcold.runtime.generation.generate import Generation
    from hotcold.runtime.generation.sampling import Sampler
    from hotcold.runtime.generation.vocabulary import Vocabulary

    _check(args)
    text = "" if args.dry_run else _prompt(args)
    sampler = Sampler(_sampling_params(args))
    args.bundle = model_path(args)
    args.ctx_size = args.ctx_size or _own_context(args.bundle)
    if args.dry_run:
        return _print_plan(args)
    vocabulary = Vocabulary.load(args.bundle)
    ids = vocabulary.encode_chat(text) if args.chat else vocabulary.encode(text)
    engine = _load_engine(args)
    stop_ids = frozenset() if args.ignore_eos else vocabulary.stop_ids
    generation = Generation(engine, ids, sampler, n_predict=args.n_predict, stop_ids=stop_ids)
    if not (args.chat or args.no_display_prompt):
        _print(text)
    interrupted = _stream(generation, vocabulary)
    _report(generation, engine, sampler, args.input_sparsity)
    return _INTERRUPTED if interrupted else 0


def _load_engine(args: argparse.Namespace) -> Engine | GpuEngine:
    return open_engine(args.bundle, args.mode, args.threads, args.ctx_size, BackendOptions.of(args))


def _print_plan(args: argparse.Namespace) -> int:
    from hotcold.runtime.placement.problem import plan_table

    options = BackendOptions.of(args)
    if options.backend != "hybrid":
        raise InputError("--dry-run requires the hybrid backend", fix="add --backend hybrid")
    print(plan_table(make_placement(args.bundle, args.mode, args.threads, args.ctx_size, options)))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Check ranges, and translate llama.cpp's special values."""
    for option, value, least, most in (("-n", args.n_predict, -2, None), ("-c", args.ctx_size, 0, _MOST)):
        if value < least or (most and value > most):
            expected = f"{least} to {most}" if most else f"{least} or more"
            raise InputError(f"{option} out of range", got=value, expected=expected)
    # Until the end of the context, or without end: here both are until the end of the context.
    args.n_predict = max(args.n_predict, -1)
    args.threads = args.threads if args.threads is None or args.threads > 0 else None


def _own_context(model: Path) -> int:
    """The context that the model was trained on."""
    from hotcold.files.gguf_split import open_gguf
    from hotcold.runtime.bundle_files import file_of_role

    file = open_gguf(model if model.is_file() else file_of_role(model, "dense", "sparse"))
    return file.count(f"{file.require('general.architecture', str)}.context_length")


def _prompt(args: argparse.Namespace) -> str:
    from hotcold.runtime.generation.prompt import given_prompt, read_prompt

    if args.file is None and args.prompt is None:
        raise InputError("no prompt", fix="give -p TEXT or -f FILE")
    return given_prompt(args.prompt, escapes=args.escape) if args.file is None else read_prompt(args.file)


def _sampling_params(args: argparse.Namespace) -> SamplingParams:
    from hotcold.runtime.generation.sampling import SamplingParams

    return SamplingParams(
        temp=max(args.temp, 0.0),  # negative means greedy, and for top_k all tokens, as in llama.cpp
        top_k=max(args.top_k, 0),
        top_p=args.top_p,
        min_p=args.min_p,
        repeat_penalty=args.repeat_penalty,
        repeat_last_n=args.repeat_last_n,
        seed=-1 if args.seed == _RANDOM_SEED else args.seed,
    )


def _print(text: str) -> None:
    print(text, end="", flush=True)


def _stream(generation: Generation, vocabulary: Vocabulary) -> bool:
    """Print the text as it is generated; return whether Ctrl-C ended it."""
    from hotcold.runtime.generation.vocabulary import TextStream

    stream = TextStream(vocabulary.tokenizer)
    interrupted = False
    try:
        for token in generation:
            _print(stream.push(token))
    except KeyboardInterrupt:
        interrupted = True
    _print(stream.flush() + "\n")
    return interrupted


def _report(
    generation: Generation, engine: Engine | GpuEngine, sampler: Sampler, input_sparsity: float
) -> None:
    if generation.stopped_by == "context":
        log(f"stopped: the context of {engine.n_ctx} tokens is full; raise it with -c")
    prompt = f"{generation.n_prompt} tokens{_rate(generation.n_prompt, generation.prompt_seconds)}"
    generated = f"{generation.n_generated} tokens{_rate(generation.n_decoded, generation.decode_seconds)}"
    seed = f", seed {sampler.seed}" if sampler.params.temp > 0 else ""
    log(f"prompt:     {prompt}")
    log(f"generation: {generated}{seed}")
    log(f"neurons:    {_neurons(engine.stats(), engine.mode)} ({engine.mode} mode, -t {engine.n_threads})")
    if input_sparsity:
        log(f"inputs:     {input_sparsity:.1%} of the attention inputs skipped")
    elif left_out := engine.stats().input_sparsity:
        from hotcold.runtime.stats import show_inputs

        log(f"inputs:     skipped by the model's rules: {show_inputs(left_out)}")
    if measured := getattr(engine, "measured", None):  # what a hybrid engine tells besides
        for line in measured().lines():
            log(line)


def _rate(n_tokens: int, seconds: float) -> str:
    return f", {n_tokens / seconds:.1f} tokens/s" if seconds > 0 else ""


def _neurons(stats: Stats, mode: str) -> str:
    """The share of neurons that were computed, over prompt, generation, and all layers."""
    fired = f"{1 - stats.sparsity:.1%} fired"
    return f"{fired}, {1 - stats.predicted_sparsity:.1%} predicted" if mode == "predicted" else fired
