"""Which engine runs a model: the CPU engine, one device, or both together; and the options that say so.

Nothing here imports torch before an engine on a device is asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hotcold.cpus import thread_count
from hotcold.errors import InputError, StorageError
from hotcold.progress import log

if TYPE_CHECKING:
    import numpy as np

    from hotcold.files.gguf import GGUFFile
    from hotcold.runtime.engine import Engine
    from hotcold.runtime.gpu.engine import GpuEngine
    from hotcold.runtime.placement.plan import Placement

__all__ = [
    "BackendOptions",
    "add_backend_arguments",
    "add_input_sparsity",
    "load_bundle",
    "make_placement",
    "open_engine",
]

BACKENDS = ("cpu", "gpu", "hybrid")


@dataclass(frozen=True, slots=True)
class BackendOptions:
    """Where to compute, and how. `place` is a plan to use, `firing` what tells how often neurons fire."""

    backend: str = "cpu"
    device: str = "cuda"
    vram_budget: str = "auto"
    place: str | None = None
    firing: str | None = None
    allow_pickle: bool = False
    input_sparsity: float = 0.0

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError("unknown backend", got=self.backend, expected=" | ".join(BACKENDS))
        if self.input_sparsity and self.backend != "cpu":
            raise InputError("--input-sparsity requires the cpu backend", got=self.backend)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """From the options that `add_backend_arguments` declares."""
        return cls(**{name: getattr(args, name) for name in cls.__slots__})


def add_backend_arguments(group: argparse._ArgumentGroup) -> None:
    """Declare the options of a command that loads a model."""
    add = group.add_argument
    add(
        "--backend", choices=BACKENDS, default="cpu",
        help="cpu; gpu: everything on GPUs; hybrid: hot neurons on GPUs, cold ones on the CPU (%(default)s)",
    )  # fmt: skip
    add(
        "--device", default="cuda", metavar="LIST",
        help="cuda: as many GPUs as needed; cuda:0,cuda:1: these GPUs, filled with layers in this order; "
        "cpu or cpu,cpu: torch on the CPU stands in for GPUs (%(default)s)",
    )  # fmt: skip
    add(
        "--vram-budget", default="auto", metavar="SIZES",
        help="gpu, hybrid: memory to use per device, such as 6G, or 6G,4G for two devices (default unit: "
        "GiB); auto: all free memory (%(default)s)",
    )  # fmt: skip
    add("--place", metavar="FILE", help="hybrid: use this plan, or PowerInfer's .gpuidx")
    add(
        "--firing", metavar="DIR",
        help="hybrid: traces, predictors, or activation_N.pt files with firing frequencies (default: the "
        "bundle's predictors)",
    )  # fmt: skip
    add_input_sparsity(group)
    add("--allow-pickle", action="store_true", help="allow pickles in --firing; they are read in a sandbox")


def add_input_sparsity(group: argparse._ActionsContainer) -> None:
    """Declare `--input-sparsity`."""
    group.add_argument(
        "--input-sparsity", type=float, default=0.0, metavar="SHARE",
        help="cpu: skip this share of the attention matrices' inputs, the smallest ones; costs quality "
        "(%(default)s)",
    )  # fmt: skip


def load_bundle(
    path: str | Path,
    mode: str = "auto",
    *,
    n_ctx: int = 2048,
    n_threads: int | None = None,
    backend: str = "cpu",
    device: str = "cuda",
    vram_budget: str = "auto",
    input_sparsity: float = 0.0,
) -> Engine:
    """Load a bundle's folder, or a GGUF file, to run it.

    `mode` is `dense`, `exact`, `predicted`, or `auto`: the fastest that the model offers, measured once.
    `n_ctx` is how many tokens a sequence holds unless it asks for another number. `n_threads` is at most the
    number of CPUs, which is the default. `backend` is `cpu`, `gpu` or `hybrid`; it and the rest are the
    command line's options of these names. Raises the classes of `hotcold.errors`.
    """
    options = BackendOptions(backend, device, vram_budget, input_sparsity=input_sparsity)
    return open_engine(path, mode, n_threads, n_ctx, options)


def open_engine(
    bundle: str | Path, mode: str, n_threads: int | None, n_ctx: int, options: BackendOptions | None = None
) -> Engine | GpuEngine:
    """Load a bundle or a GGUF file into the engine that `options` asks for.

    All engines have the contract of `hotcold.runtime.engine.Engine`. Raises what they raise, and
    UnsupportedError for a device that is not there.
    """
    options = options or BackendOptions()
    if options.backend == "cpu":
        from hotcold.runtime.cpu.engine import CpuEngine

        return CpuEngine.load(bundle, mode, n_threads, n_ctx, options.input_sparsity)
    if options.backend == "gpu":
        from hotcold.runtime.gpu.engine import GpuEngine

        return GpuEngine.load(bundle, mode, options.device, n_ctx, options.vram_budget)
    from hotcold.runtime.gpu.hybrid import HybridEngine

    placement = make_placement(bundle, mode, n_threads, n_ctx, options)
    if not options.place:
        _save(placement, bundle, mode)
    return HybridEngine.load(bundle, placement, mode, options.device, n_threads, n_ctx)


def make_placement(
    bundle: str | Path, mode: str, n_threads: int | None, n_ctx: int, options: BackendOptions
) -> Placement:
    """The plan that a hybrid engine of these options would use; no weights are loaded for it."""
    from hotcold.files.gguf_split import open_gguf
    from hotcold.model.spec import ModelSpec
    from hotcold.runtime.gpu.device import open_devices, parse_budgets
    from hotcold.runtime.gpu.engine import file_and_mode
    from hotcold.runtime.placement.costs import measure_costs
    from hotcold.runtime.placement.file import load_placement
    from hotcold.runtime.placement.plan import place, place_layers
    from hotcold.runtime.placement.problem import make_problem

    path, mode = file_and_mode(bundle, mode)
    file, devices = open_gguf(path), open_devices(options.device)
    shape = ModelSpec.from_gguf(file)
    if options.place:
        return load_placement(options.place, shape.n_layers, shape.d_ff, _fingerprint(file))
    budgets = parse_budgets(options.vram_budget, devices)
    frequencies = None if mode == "dense" else _frequencies(bundle, shape.n_layers, shape.d_ff, options)
    # Of several devices the first speaks for all.
    threads = thread_count(n_threads)
    costs = measure_costs(devices[0], threads, shape.d_model, shape.d_ff)
    problem = make_problem(file, frequencies, mode=mode, n_ctx=n_ctx, budgets=budgets, costs=costs)
    return place_layers(problem) if mode == "dense" else place(problem)


def _frequencies(
    bundle: str | Path, n_layers: int, d_ff: int, options: BackendOptions
) -> Sequence[np.ndarray] | None:
    """How often each neuron fires; logs it and returns None if that is unknown."""
    from hotcold.convert.firing_frequencies import firing_frequencies

    if options.firing:
        return firing_frequencies(options.firing, n_layers, d_ff, pickles=options.allow_pickle)
    try:
        return firing_frequencies(bundle, n_layers, d_ff)
    except InputError:
        log("firing frequencies are unknown: all neurons are treated alike; pass --firing to provide them")
        return None


def _fingerprint(file: GGUFFile) -> str | None:
    return file.find("hotcold.model_fingerprint", str)


def _save(placement: Placement, bundle: str | Path, mode: str) -> None:
    from hotcold.files.gguf_split import open_gguf
    from hotcold.runtime.gpu.engine import file_and_mode
    from hotcold.runtime.placement.file import plan_path, save_placement

    path, mode = file_and_mode(bundle, mode)
    saved = plan_path(bundle, mode, placement.budgets)
    try:
        save_placement(placement, saved, _fingerprint(open_gguf(path)))
        log(f"plan: {saved}")
    except StorageError as error:
        log(f"could not save the plan: {error}")
