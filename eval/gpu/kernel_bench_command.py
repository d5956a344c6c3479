"""`hotcold bench-kernels`: the sparse GPU operators against the dense product and the bandwidth limit."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hotcold.files.json import json_text
from hotcold.table import markdown

if TYPE_CHECKING:
    import torch

    from hotcold.eval.gpu.kernel_bench import KernelPlan, KernelRow

HELP = (
    "Time the sparse operators S2 (up), S3 (down), and the whole FFN on a device. Copies of the weights take "
    "turns so that no cache holds them. The table compares with torch's dense product and with the time "
    "that reading the weights takes at the measured bandwidth."
)
EXAMPLE = "hotcold bench-kernels --shape llama-2-7b --dtype bf16 --sparsity 0.89"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hotcold bench-kernels`."""
    add = parser.add_argument
    add(
        "--shape",
        default="llama-2-7b",
        metavar="NAME",
        help="a shape of `hotcold bench --synthetic` (%(default)s)",
    )
    add("--d-model", type=int, metavar="N", help="override d_model of the shape")
    add("--d-ff", type=int, metavar="N", help="override d_ff of the shape")
    add("--dtype", default="bf16", metavar="T", help="bf16, f16, or f32 (%(default)s)")
    add(
        "--sparsity",
        type=float,
        default=0.89,
        metavar="S",
        help="share of neurons that do not fire (%(default)s)",
    )
    add("--device", default="cuda", help="cuda, cuda:N, or cpu for a dry run (%(default)s)")
    add("-r", "--repetitions", type=int, default=30, metavar="N", help="rounds (%(default)s)")
    add("--check", action="store_true", help="only compare with the reference operators")
    add("-o", "--output", default="md", choices=("md", "json"))


def run(args: argparse.Namespace) -> int:
    """Measure or check, and print the table or one JSON object."""
    from hotcold.cpus import available_cpus
    from hotcold.eval.gpu.kernel_bench import check_kernels, measure_kernels
    from hotcold.runtime.gpu.device import open_device
    from hotcold.runtime.placement.costs import device_bandwidth

    device, plan = open_device(args.device), _plan(args)
    if args.check:
        print(json_text(check_kernels(plan, device)))
        return 0
    bandwidth = device_bandwidth(device, available_cpus())
    rows = measure_kernels(plan, device, bandwidth)
    print(_json(plan, rows, device) if args.output == "json" else _table(plan, rows))
    return 0


def _plan(args: argparse.Namespace) -> KernelPlan:
    from hotcold.errors import InputError
    from hotcold.eval.gpu.kernel_bench import KernelPlan
    from hotcold.eval.synthetic.shapes import SHAPES

    if args.shape not in SHAPES:
        raise InputError("unknown synthetic shape", got=args.shape, expected=" | ".join(SHAPES))
    shape = SHAPES[args.shape]
    return KernelPlan(
        d_model=args.d_model or shape["hidden_size"],
        d_ff=args.d_ff or shape["intermediate_size"],
        dtype=args.dtype,
        sparsity=args.sparsity,
        rounds=args.repetitions,
        # A dry run needs no more than a few copies.
        **({"rotated": 1} if args.device == "cpu" or args.check else {}),
    )


def _json(plan: KernelPlan, rows: list[KernelRow], device: torch.device) -> str:
    from dataclasses import asdict

    from hotcold.eval.machine import describe

    found = {"plan": asdict(plan), "device": device_name(device), "rows": [row.as_json() for row in rows]}
    return json_text(found | {"machine": describe()})


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _table(plan: KernelPlan, rows: list[KernelRow]) -> str:
    title = (
        f"d_model {plan.d_model}, d_ff {plan.d_ff}, {plan.dtype}, {plan.sparsity:.1%} idle, "
        f"{rows[0].bandwidth / 1e9:.0f} GB/s read"
    )
    head = ("operator", "us", "spread", "dense us", "vs dense", "byte limit us", "over limit")
    lines = [
        (
            row.operator,
            f"{row.us:.2f}",
            f"{row.us_low:.2f}–{row.us_high:.2f}",
            f"{row.dense_us:.2f}",
            f"{row.speedup:.2f}x",
            f"{row.limit_us:.2f}",
            f"{row.over_limit:.2f}x",
        )
        for row in rows
    ]
    return f"{title}\n\n{markdown(head, lines)}"
