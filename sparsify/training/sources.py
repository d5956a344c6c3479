"""The texts that a config names, opened."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from hotcold import text
from hotcold.model.limits import check_ids, n_embeddings
from hotcold.sparsify.config import GENERATED, Config, Text
from hotcold.sparsify.training.data import Documents, Mixture, Source, TokenRows, read_windows
from hotcold.sparsify.training.teacher_text import read_rows, teacher_text

__all__ = ["heldout_windows", "training_data"]

_TOKEN_FILE = ".safetensors"


def heldout_windows(tokenizer: Tokenizer, config: Config, part: text.Part, n_tokens: int) -> Tensor:
    """Windows int64 [n, sequence] of one part of `config.heldout`: `test` is reported, `calibrate` steers."""
    documents = text.documents(config.heldout, part)
    where = f"{config.heldout}, {part} part"
    return read_windows(documents, tokenizer, config.sequence, n_tokens, where)


def training_data(
    teacher: PreTrainedModel, tokenizer: Tokenizer, config: Config, folder: Path, accelerator: Accelerator
) -> Mixture:
    """The mixture of the config's texts. What the dense model writes goes to `folder`, once for all.

    The first window of each text is read here, so that a missing or short one is refused at once.
    """

    def open_text(wanted: Text) -> Source:
        if wanted.source == GENERATED:
            with accelerator.main_process_first():
                rows = teacher_text(
                    teacher, tokenizer, config.sequence, config.generated, folder, config.seed
                )
            return TokenRows(rows)
        if wanted.source.endswith(_TOKEN_FILE):
            rows = read_rows(Path(wanted.source), config.sequence)
            check_ids(rows.numpy(), n_embeddings(teacher))
            return TokenRows(rows)
        return _documents(wanted.source, tokenizer, config)

    return Mixture([(open_text(wanted), wanted.share) for wanted in config.text if wanted.share], config.seed)


def _documents(source: str, tokenizer: Tokenizer, config: Config) -> Documents:
    documents = Documents(
        partial(_training_part, source), tokenizer, config.sequence, pack=config.pack, where=source
    )
    begin = documents.state()
    documents.take(1)
    documents.restore(begin)
    return documents


def _training_part(source: str) -> Iterator[text.Document]:
    return text.documents(source, "train")
