"""Predictor bundles on the Hugging Face hub, where PowerInfer's predictors are published too.

The two functions behind `from_pretrained` and `save_pretrained`. `huggingface_hub` is imported inside them: a
local folder needs neither it nor a network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hotcold.errors import InputError

__all__ = ["downloaded", "pushed"]


def downloaded(source: str | Path, files: Sequence[str], **options: Any) -> Path:
    """The folder `source`, or the cached download of the repository of that name.

    `options` are those of `huggingface_hub.snapshot_download`. InputError if the hub does not provide it.
    """
    if Path(source).is_dir() or Path(source).is_absolute():
        return Path(source)
    from huggingface_hub import snapshot_download

    with _hub_errors(str(source)):
        return Path(snapshot_download(str(source), allow_patterns=list(files), **options))


def pushed(
    folder: Path,
    files: Sequence[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload activation predictors",
) -> None:
    """Upload files of `folder` as a model repository, created if necessary. InputError if the hub refuses."""
    from huggingface_hub import HfApi

    with _hub_errors(repo_id):
        hub = HfApi(token=token)
        repository = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        hub.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(files), commit_message=commit_message
        )


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub client has dozens of error classes of several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "check the path, or the hub id and the network"
        raise InputError(
            f"neither a local folder nor on the hub: {reason}", where=repo_id, fix=fix
        ) from error
