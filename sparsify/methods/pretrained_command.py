"""The `pretrained` method on the command line: trained FFNs that come with hotcold, in the dense model."""

from __future__ import annotations

import argparse
from typing import Any

from hotcold.cpus import torch_threads
from hotcold.ownership import check_replaceable

__all__ = ["run"]


def run(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """Put the trained FFNs into the dense model, and print where its card is."""
    check_replaceable(args.out, "checkpoint", [args.model])
    torch_threads()
    from hotcold.model import checkpoint
    from hotcold.shipped import CARD
    from hotcold.sparsify.methods.pretrained import unpack

    dense = checkpoint.load_model(args.model)
    sparse = unpack(dense, checkpoint.fingerprint(args.model))
    tokenizer, files = checkpoint.load_tokenizer(args.model), {"README.md": CARD.read_bytes()}
    checkpoint.save(sparse.half(), tokenizer, args.out, like=args.model, files=files)
    print(f"{args.out}: how it was made and what it scores says {args.out / 'README.md'}")
    return 0
