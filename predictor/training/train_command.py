"""`hotcold train-predictors`: learn to predict which neurons will fire."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hotcold.cpus import torch_threads
from hotcold.errors import InputError, MismatchError
from hotcold.files.json import json_text

if TYPE_CHECKING:
    from hotcold.model.gates import Gates
    from hotcold.predictor.traces.reader import TraceRun
    from hotcold.predictor.training.train import TrainOptions

HELP = (
    "Make, for each FFN layer, a predictor of which neurons fire: a small trained network (lowrank-mlp), or "
    "the model's own gates cut to a low rank (svd). The traces' train tokens are fitted, their calibration "
    "tokens choose the epoch and the threshold, and the printed figures are of their test tokens."
)
EXAMPLE = "hotcold train-predictors --traces traces --out predictors"

# Options that only some kinds have, by their names in `TrainOptions`.
_OF_KINDS = {"epochs": "epochs", "batch": "batch", "learning_rate": "lr", "seed": "seed"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--traces", required=True, help="folder from `hotcold collect-traces`")
    parser.add_argument("--out", required=True, help="folder for the predictor bundle")
    parser.add_argument("--kind", default="lowrank-mlp", help="lowrank-mlp (default) or svd")
    parser.add_argument("--model", help="the model that was traced; svd needs it")
    parser.add_argument("--rank", type=int, help="hidden size, a multiple of 32 (default: 4·sqrt(d_model))")
    parser.add_argument(
        "--target-recall",
        type=float,
        default=0.97,
        help="share of firing neurons to predict, on the calibration tokens (default 0.97)",
    )
    network = parser.add_argument_group("lowrank-mlp")
    network.add_argument("--epochs", type=int, help="maximum number of passes over the traces (default 10)")
    network.add_argument("--batch", type=int, help="tokens per step (default 512)")
    network.add_argument("--lr", type=float, help="peak learning rate (default 0.01)")
    network.add_argument("--seed", type=int, help="random seed for weights and batches (default 0)")
    parser.add_argument(
        "-t", "--threads", type=int, help="layers to train at a time, one per CPU (default: all CPUs)"
    )
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Train what is missing, write the bundle, and print its table."""
    from hotcold.predictor.out_folder import check_out

    check_out(args.out, args.traces)

    n_threads = torch_threads(args.threads)
    from hotcold.predictor.traces.reader import Traces
    from hotcold.predictor.training.metrics import mean_metrics, table
    from hotcold.predictor.training.train_bundle import train_bundle

    traces = Traces(args.traces)
    options = _options(args, traces.run)
    bundle = train_bundle(traces, args.out, options, n_threads, _gates(args, traces.run))
    if args.json:
        print(json_text({**bundle.config(), "mean": mean_metrics(bundle.metrics).to_json()}))
    else:
        print(table(bundle.ranks, bundle.thresholds, bundle.metrics))
    return 0


def _options(args: argparse.Namespace, run: TraceRun) -> TrainOptions:
    """InputError for bad values, and for options that are another kind's."""
    from hotcold.predictor.kinds.table import KINDS
    from hotcold.predictor.training.train import TrainOptions, default_rank

    given = {name: getattr(args, flag) for name, flag in _OF_KINDS.items() if getattr(args, flag) is not None}
    rank = default_rank(run.d_model) if args.rank is None else args.rank
    options = TrainOptions(rank=rank, target_recall=args.target_recall, kind=args.kind, **given)
    known = KINDS[args.kind].trainer.settings(options)
    for name in given:
        if name not in known:
            raise InputError(f"{args.kind} predictors have no such option", where=f"--{_OF_KINDS[name]}")
    return options


def _gates(args: argparse.Namespace, run: TraceRun) -> Gates | None:
    """The gates of the traced model, for kinds that need it. MismatchError for another model."""
    from hotcold.predictor.kinds.table import KINDS

    if not KINDS[args.kind].needs_model:
        return None
    if args.model is None:
        what = f"{args.kind} predictors are made of the model's own gates"
        raise InputError(what, where="--model", fix="give the model that was traced")
    from hotcold.model.checkpoint import fingerprint
    from hotcold.model.gates import Gates

    if (got := fingerprint(args.model)) != run.model_fingerprint:
        raise MismatchError(
            "traces of another model", where=args.traces, got=run.model_fingerprint[:12], expected=got[:12]
        )
    return Gates(args.model)
