"""`hotcold train-predictors`: learn to predict which neurons will fire."""

from __future__ import annotations

import argparse

from hotcold.cpus import torch_threads
from hotcold.files.json import json_text

HELP = (
    "Train, for each FFN layer, a small network that predicts which neurons fire. The traces' train tokens "
    "are fitted, their calibration tokens choose the epoch and the threshold, and the printed figures are of "
    "their test tokens."
)
EXAMPLE = "hotcold train-predictors --traces traces --out predictors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--traces", required=True, help="folder made by collect-traces")
    parser.add_argument("--out", required=True, help="folder of the predictor bundle")
    parser.add_argument("--rank", type=int, help="hidden size, a multiple of 32 (default: 4·sqrt(d_model))")
    parser.add_argument(
        "--target-recall",
        type=float,
        default=0.97,
        help="share of firing neurons to predict, on the tokens for calibration (default 0.97)",
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the traces at most (default 10)")
    parser.add_argument("--batch", type=int, default=512, help="tokens per step (default 512)")
    parser.add_argument("--lr", type=float, default=1e-2, help="peak learning rate (default 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument(
        "-t", "--threads", type=int, help="layers at a time, on a CPU each (default: all CPUs)"
    )
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train what is missing, write the bundle, and print its table."""
    from hotcold.predictor.out_folder import check_out

    check_out(args.out, args.traces)

    n_threads = torch_threads(args.threads)
    from hotcold.predictor.traces.reader import Traces
    from hotcold.predictor.training.metrics import mean_metrics, table
    from hotcold.predictor.training.network import default_rank
    from hotcold.predictor.training.train import TrainOptions
    from hotcold.predictor.training.train_bundle import train_bundle

    traces = Traces(args.traces)
    options = TrainOptions(
        rank=default_rank(traces.run.d_model) if args.rank is None else args.rank,
        target_recall=args.target_recall, epochs=args.epochs, batch=args.batch,
        learning_rate=args.lr, seed=args.seed,
    )  # fmt: skip
    bundle = train_bundle(traces, args.out, options, n_threads)
    if args.json:
        print(json_text({**bundle.config(), "mean": mean_metrics(bundle.metrics).to_json()}))
    else:
        print(table(bundle.ranks, bundle.thresholds, bundle.metrics))
    return 0
