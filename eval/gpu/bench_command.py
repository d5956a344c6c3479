"""`hotcold bench-gpu`: decoding speed on a GPU, alone or together with the CPU at several memory budgets."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hotcold.cpus import thread_count
from hotcold.files.json import json_text

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

HELP = (
    "Measure decoding with a GPU. Each mode runs on the GPU alone and, for each memory budget, on GPU and "
    "CPU together (hybrid), where `dense` assigns whole layers to either side. Optionally, llama.cpp and "
    "transformers with accelerate's offloading run at the same budgets. The table shows telemetry, and peak "
    "memory next to the planned one."
)
EXAMPLE = "hotcold bench-gpu --bundle demo/bundle --backends gpu,hybrid --budgets 25,50,75"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold bench-gpu`."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--bundle", metavar="DIR", help="a bundle from `hotcold export`")
    model.add_argument(
        "--synthetic", metavar="SHAPE", help="use random weights, as `hotcold bench --synthetic` does"
    )
    add = parser.add_argument
    add(
        "--backends", default="gpu,hybrid", metavar="LIST",
        help="backends from gpu, hybrid, llama.cpp, accelerate (%(default)s)",
    )  # fmt: skip
    add(
        "-m",
        "--modes",
        default="dense,exact,predicted",
        metavar="LIST",
        help="modes to measure (%(default)s)",
    )
    add(
        "--budgets",
        default="25,50,75",
        metavar="LIST",
        help="GPU memory, in percent of the model's size (%(default)s)",
    )
    add(
        "--device", default="cuda:0", metavar="LIST",
        help="one GPU, or several such as cuda:0,cuda:1, each with the full budget; cpu: dry run "
        "(%(default)s)",
    )  # fmt: skip
    add("-t", "--threads", type=int, metavar="N", help="CPU threads (default: all CPUs)")
    add("-r", "--repetitions", type=int, default=5, metavar="N", help="rounds (%(default)s)")
    add("-p", "--n-prompt", type=int, default=64, metavar="N", help="tokens per prompt (%(default)s)")
    add("-n", "--n-gen", type=int, default=128, metavar="N", help="tokens per generation (%(default)s)")
    add("--check", action="store_true", help="only compare greedy tokens with the CPU engine's")
    add(
        "--text",
        default="stdlib",
        metavar="SRC",
        help="text for --bundle; stdlib: its test part (%(default)s)",
    )
    add("-o", "--output", default="md", choices=("md", "json"))
    add("--save", metavar="FILE", help="also write the report as JSON to this file")
    group = parser.add_argument_group("synthetic models")
    group.add_argument("--layers", type=int, metavar="N", help="number of layers (default: all)")
    group.add_argument(
        "--sparsity",
        type=float,
        default=0.89,
        metavar="S",
        help="share of neurons that do not fire (%(default)s)",
    )
    group.add_argument("--quant", default="bf16", metavar="Q", help="q4_0, q8_0, f16, or bf16 (%(default)s)")
    group.add_argument(
        "--cache", metavar="DIR", help="keep the synthetic files in this folder for the next run"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table or one JSON object."""
    import tempfile
    from pathlib import Path

    from hotcold import storage
    from hotcold.ownership import check_file

    if args.save:
        check_file(args.save, "report")
    with tempfile.TemporaryDirectory(prefix="hotcold-bench-") as scratch:
        report, table = _measure(args, Path(scratch))
    if args.save:
        check_file(args.save, "report")  # again, because time has passed
        storage.write_json(args.save, report)
    print(json_text(report) if args.output == "json" else table, flush=True)
    return 0


def _measure(args: argparse.Namespace, scratch: Path) -> tuple[dict, str]:
    """The report and its table."""
    from hotcold.eval import agreement, machine
    from hotcold.eval.bench import Plan, segments
    from hotcold.eval.gpu import bench as gpu_bench
    from hotcold.eval.gpu.kernel_bench_command import device_name
    from hotcold.eval.sides import checked_modes
    from hotcold.identify import REPORT
    from hotcold.runtime.gpu.device import open_devices
    from hotcold.runtime.placement.costs import device_bandwidth

    device = open_devices(args.device)[0]
    plan, threads = Plan(args.repetitions, args.n_prompt, args.n_gen), thread_count(args.threads)
    modes = checked_modes(args.modes, ("dense", "exact", "predicted"))
    shares = [_percent(text) for text in args.budgets.split(",") if text.strip()]
    bundle, ids = _synthetic(args, plan.n_tokens, scratch) if args.synthetic else _real(args, plan.n_tokens)
    sides = gpu_bench.sides_of(bundle, [name.strip() for name in args.backends.split(",")], modes, shares)
    bandwidth = device_bandwidth(device, threads)
    where = {"device": args.device, "n_threads": threads}
    if args.check:
        sides = [side for side in sides if side.backend not in gpu_bench.PEERS]
        rows = agreement.agreement(bundle, sides, ids[: args.n_prompt], args.n_gen, **where)
        table = agreement.as_table(rows)
    else:
        rows = gpu_bench.bench_gpu(bundle, sides, segments(ids, plan), bandwidth=bandwidth, **where)
        table = gpu_bench.as_table(rows)
    settings = ("synthetic", "layers", "quant", "sparsity") if args.synthetic else ("bundle", "text")
    report = REPORT | {
        "rows": [row.as_json() for row in rows],
        "device": device_name(device),
        "bandwidth": bandwidth,
        "settings": {name: getattr(args, name) for name in (*settings, "repetitions", "n_prompt", "n_gen")},
        "threads": threads,
        "machine": machine.describe(),
    }
    return report, table


def _percent(text: str) -> float:
    from hotcold.errors import InputError

    try:
        share = float(text) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 10:
        raise InputError(
            "not a list of percentages", where="--budgets", got=text, expected="such as 25,50,75"
        )
    return share


def _real(args: argparse.Namespace, n_tokens: int) -> tuple[Path, np.ndarray]:
    from pathlib import Path

    from hotcold.eval import windows

    return Path(args.bundle), windows.text_ids(args.text, windows.load_tokenizer(args.bundle), n_tokens)


def _synthetic(args: argparse.Namespace, n_tokens: int, scratch: Path) -> tuple[Path, np.ndarray]:
    from hotcold.eval.synthetic.planted import pseudo_text
    from hotcold.eval.synthetic.shapes import Synthetic, write_synthetic

    synthetic = Synthetic(
        shape=args.synthetic, sparsity=args.sparsity, quant=args.quant, n_layers=args.layers
    )
    ids = pseudo_text(synthetic.config["vocab_size"], n_tokens, seed=synthetic.seed + 2)
    return write_synthetic(synthetic, args.cache or scratch), ids
