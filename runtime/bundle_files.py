"""What a model's name refers to, and which of its files serves which mode: one answer for every command.

A model is a bundle's folder, a GGUF file, or one of the names that `hotcold.model.checkpoint` knows. A GGUF
file runs as it is. A Hugging Face checkpoint becomes a bundle in the user's cache first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from hotcold.convert.bundle.input_rows import ATTENTION, RULES
from hotcold.convert.bundle.manifest import MANIFEST, Manifest
from hotcold.errors import InputError
from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import gguf_sha256, open_gguf
from hotcold.files.quantize import type_of
from hotcold.identify import identify
from hotcold.model.families import names_in

__all__ = ["MODES", "QUANT", "ModelPath", "file_of_role", "find_model"]

MODES = ("dense", "exact", "predicted")  # what can be computed; `auto` is one of them
QUANT = "q8_0"  # of checkpoints that are run


def find_model(name: str | Path, quant: str | None = None) -> Path:
    """The bundle's folder or the GGUF file of a model; a checkpoint is converted to `quant`.

    Raises InputError for what is not a model or already has a type, and what conversion raises.
    """
    from hotcold.model.checkpoint import resolve
    from hotcold.runtime.model_cache import cached_bundle

    if quant:
        type_of(quant)  # before anything is read
    path = Path(name).expanduser()
    if not (path.is_dir() and identify(path).kind == "bundle"):
        if path.is_dir() and not (path / "config.json").is_file():
            what, fix = "neither a bundle nor a checkpoint", "create a bundle with `hotcold export`"
            expected = f"{MANIFEST}, or config.json and *.safetensors"
            raise InputError(what, where=path, expected=expected, fix=fix)
        path = resolve(str(name))
        if path.is_dir():
            return cached_bundle(path, str(name), quant or QUANT)
    if quant:
        fix = "create another file with `hotcold export` or `hotcold convert`"
        raise InputError(
            "the weights of this model already have their types", where=path, got=f"--quant {quant}", fix=fix
        )
    return path


class ModelPath:
    """A bundle's folder or a GGUF file: the modes that it offers, and the file of each."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.is_file = self.path.is_file() or self.path.suffix == ".gguf"

    @property
    def name(self) -> str:
        """The model's name for display."""
        return self.path.name if self.is_file else _manifest(self.path).name

    @cached_property
    def modes(self) -> list[str]:
        """Those of MODES that it offers. Raises InputError or FormatError for what is not a model."""
        if self.is_file:
            return _modes_of(open_gguf(self.path))
        manifest = _manifest(self.path)
        dense = ["dense"] if manifest.of_role("dense") else []
        sparse = _modes_of(open_gguf(file_of_role(self.path, "sparse"))) if manifest.of_role("sparse") else []
        return dense + sparse

    def file_for(self, mode: str) -> Path:
        """The GGUF file that a mode reads; InputError, which says what there is, where there is none."""
        if mode not in MODES:
            raise InputError("unknown mode", got=mode, expected=", ".join(("auto", *MODES)))
        if not self._offers(mode):
            _refuse(self.path, mode, self.modes)
        return (
            self.path if self.is_file else file_of_role(self.path, "dense" if mode == "dense" else "sparse")
        )

    def _offers(self, mode: str) -> bool:
        """A bundle's dense file can be used even if the other one is broken."""
        if mode == "dense" and not self.is_file:
            return bool(_manifest(self.path).of_role("dense"))
        return mode in self.modes

    @property
    def llama_cpp_exact(self) -> bool:
        """Whether stock llama.cpp computes the model's function from the dense file."""
        if self.is_file:
            return "hotcold.llama_cpp_differences" not in open_gguf(self.path).metadata
        return _manifest(self.path).llama_cpp_exact

    def input_rows(self, *, any_share: bool) -> Path | None:
        """The file with matrices by input, if there is one: that for the model's own rules, else the one from
        which `any_share` can be left out."""
        manifest = None if self.is_file else _manifest(self.path)
        roles = [role for role in (RULES, ATTENTION) if manifest is not None and manifest.of_role(role)]
        wanted = [role for role in roles if role == RULES or any_share]
        return file_of_role(self.path, wanted[0]) if wanted else None

    def content(self) -> str:
        """A hash over its content: the manifest's own, or that of the GGUF file."""
        from hotcold.cache import sha256

        if self.is_file:
            return gguf_sha256(open_gguf(self.path), sha256)
        return _manifest(self.path).to_json()["sha256"]


def _modes_of(file: GGUFFile) -> list[str]:
    names = names_in(file)
    if f"{names['down'].format(0)}_t.weight" not in file.tensors:
        return ["dense"]
    return ["exact", "predicted"] if f"{names['fc1'].format(0)}.weight" in file.tensors else ["exact"]


def _refuse(path: Path, mode: str, offered: Sequence[str]) -> NoReturn:
    fix = {
        "dense": "add a dense file with `hotcold convert --to bundle`",
        "exact": "export a model with exact zeros, such as one from `hotcold sparsify`",
        "predicted": "train predictors with `hotcold train-predictors`, and pass them to `hotcold export`",
    }[mode]
    what = "this model does not offer this mode"
    raise InputError(what, where=path, got=mode, expected=" or ".join(offered), fix=fix)


def _manifest(bundle: Path) -> Manifest:
    if identify(bundle).kind != "bundle":
        fix = "create one with `hotcold export`"
        raise InputError(f"not a bundle: no {MANIFEST}", where=bundle, fix=fix)
    return Manifest.read(bundle)


def file_of_role(bundle: str | Path, *roles: str) -> Path:
    """The file with the first of these roles that the bundle has.

    Raises InputError if there is no bundle or no such file, FormatError if its manifest is broken.
    """
    manifest = _manifest(Path(bundle))
    names = [name for role in roles for name in manifest.of_role(role)]
    if not names:
        raise InputError(f"the bundle has no {' or '.join(roles)} file", where=bundle)
    path = Path(bundle) / names[0]
    if not path.is_file():
        raise InputError(
            "the manifest names a file that is missing", where=path, fix="export the bundle again"
        )
    return path
