"""What a training run is made of, as one YAML file: typed, complete, and refused where it says anything else.

Every field has a default, so that a file holds only what it changes; files that come with hotcold lie in
`recipes/` and are named without a path. No torch in here: the command line checks a config before loading it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hotcold.errors import FormatError, InputError, UnsupportedError
from hotcold.sparsify.training.schedule import ProgressiveL1, Stage

__all__ = [
    "GENERATED",
    "L1",
    "REDUCTIONS",
    "Checkpoints",
    "Config",
    "Generated",
    "Learning",
    "Loss",
    "ModelSize",
    "Reduction",
    "Text",
    "WarmStart",
    "load_config",
    "recipes",
]

Reduction = Literal["mean", "token_sum", "sum"]
REDUCTIONS: tuple[Reduction, ...] = typing.get_args(Reduction)
GENERATED = "generated"  # the text source that the dense model is itself
_RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The model that a config was made for; another one is refused."""

    n_layers: int
    d_model: int
    d_ff: int


@dataclass(frozen=True, slots=True)
class Text:
    """A text source (see `hotcold.text`) and its share of the training tokens.

    The source `generated` is what the dense model writes itself; a file `*.safetensors` holds token ids.
    """

    source: str
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Generated:
    """How much the dense model writes for the source `generated`; it is read again when used up."""

    tokens: int = 200_000
    batch: int = 128
    top_k: int = 256
    begin: str = ""


@dataclass(frozen=True, slots=True)
class WarmStart:
    """Layer-wise distillation before the end-to-end training; none where `steps` is 0."""

    steps: int = 0
    lr: float = 1e-3
    warmup: int = 10


@dataclass(frozen=True, slots=True)
class L1:
    """The factor of the L1 term. `stages` are [peak, last step] pairs of ProSparse's Algorithm 1.

    With `target_sparsity` a controller sets the factor instead, starting at `start` after stage 0: times
    `multiplier` where the model is less sparse than that, divided by it where it is sparser.
    """

    stages: tuple[tuple[float, int], ...] = ((0.0, 0),)
    reduction: Reduction = "mean"
    target_sparsity: float | None = None
    start: float = 1e-4
    multiplier: float = 1.05


@dataclass(frozen=True, slots=True)
class Loss:
    """Factors of the loss terms: language modeling, KL from the dense model, each FFN's output error."""

    lm: float = 0.0
    kl: float = 1.0
    ffn: float = 0.0


@dataclass(frozen=True, slots=True)
class Learning:
    """AdamW and its learning rate: linear warm-up, then a cosine, or constant with a final decay (WSD)."""

    lr: float = 1e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup: int = 20
    floor: float = 0.05
    decay_share: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """A resumable state every so many steps; `stages` also keeps a model after each step of the method."""

    every: int = 100
    keep: int = 2
    stages: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    """One training run. `batch` counts windows of `sequence` tokens per step, over all processes together.

    `micro_batch` is how many of them one process computes at a time; the rest is accumulated. `train` is what
    learns: `ffn` the FFNs and norms, `all` every weight. From `quantize_from` (a share of the steps) on,
    weights are used as Q4_0 rounds them. Of the text `heldout`, the test part is what quality is reported on,
    in `heldout_tokens` tokens; its calibrate part tells the objective how large FFN outputs are. Texts that
    are learnt from give their train part (see `hotcold.text`).
    """

    model: ModelSize | None = None
    activation: str = "relu"
    train: Literal["ffn", "all"] = "ffn"
    steps: int = 1000
    sequence: int = 256
    batch: int = 2
    micro_batch: int = 2
    pack: bool = True
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = False
    quantize_from: float = 1.0
    warm_start: WarmStart = field(default_factory=WarmStart)
    l1: L1 = field(default_factory=L1)
    loss: Loss = field(default_factory=Loss)
    learning: Learning = field(default_factory=Learning)
    text: tuple[Text, ...] = (Text("stdlib"),)
    generated: Generated = field(default_factory=Generated)
    heldout: str = "stdlib"
    heldout_tokens: int = 8192
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError, naming the field, for a value out of its range."""
        positive = ("steps", "sequence", "batch", "micro_batch", "heldout_tokens")
        _check(self, positive, lambda value: value >= 1, ">= 1")
        _check(self, ("quantize_from",), lambda value: 0 <= value <= 1, "0 to 1")
        _check(self.learning, ("lr", "clip"), lambda value: value > 0, "> 0", "learning.")
        _check(self.loss, ("lm", "kl", "ffn"), lambda value: value >= 0, ">= 0", "loss.")
        _check(self.checkpoints, ("every", "keep"), lambda value: value >= 1, ">= 1", "checkpoints.")
        if not self.text or sum(text.share for text in self.text) <= 0 or any(t.share < 0 for t in self.text):
            raise InputError("shares of the text sources must be positive", where="text")
        if self.loss.lm + self.loss.kl + self.loss.ffn == 0:
            raise InputError("every term of the loss is off", where="loss", expected="lm, kl or ffn > 0")
        _check_activation(self.activation)
        self.l1_schedule()
        target = self.l1.target_sparsity
        if target is not None and not 0 < target < 1:
            raise InputError("out of range", where="l1.target_sparsity", got=target, expected="0 to 1")

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step, over all processes."""
        return self.batch * self.sequence

    @property
    def quantize_step(self) -> int:
        """The last step before rounding begins."""
        return int(self.quantize_from * self.steps)

    @property
    def has_teacher(self) -> bool:
        """Whether the dense model is needed during training."""
        return self.loss.kl > 0 or self.loss.ffn > 0 or self.warm_start.steps > 0

    def l1_schedule(self) -> ProgressiveL1:
        """The stages as a schedule; InputError where they are none."""
        return ProgressiveL1([Stage(peak, end) for peak, end in self.l1.stages])

    def digest(self) -> str:
        """64 hex digits over all that decides what is trained; how often is saved does not."""
        fields = dataclasses.asdict(self)
        del fields["checkpoints"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _check(owner: object, names: tuple[str, ...], fits: Any, expected: str, prefix: str = "") -> None:
    for name in names:
        if not fits(value := getattr(owner, name)):
            raise InputError("out of range", where=f"{prefix}{name}", got=value, expected=expected)


def _check_activation(name: str) -> None:
    """Only what gives zeros can be trained for them."""
    from hotcold.model.firing import NAMES, FiringRule  # not for the command line: it needs numpy

    try:
        gives_zeros = FiringRule.named(name, 1).gives_zeros
    except UnsupportedError:
        gives_zeros = False
    if not gives_zeros:
        raise InputError(
            "gives no zeros, so it is not trained", where="activation", got=name,
            expected=" | ".join(known for known in NAMES if known not in ("silu", "gelu")),
        )  # fmt: skip


def recipes() -> list[str]:
    """The names of the configs that come with hotcold."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def load_config(name: str) -> Config:
    """Read a YAML file, or a recipe by its name.

    Raises InputError (no such file; a key that is unknown, with the nearest known one; a value of another
    type or out of range) and FormatError (not YAML).
    """
    import yaml

    path = _RECIPES / f"{name}.yaml" if name in recipes() else Path(name)
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        reason, known = error.strerror or str(error), " | ".join(recipes())
        raise InputError(reason, where=name, expected=f"a YAML file or one of {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError("not YAML", where=path, got=str(error)) from error
    return _build(Config, {} if content is None else content, str(path))


def _build(cls: Any, content: object, where: str) -> Any:
    """An instance of a dataclass out of a mapping; keys and values are checked against its annotations."""
    if not isinstance(content, Mapping):
        raise InputError("not a mapping of keys to values", where=where, got=repr(content))
    hints = typing.get_type_hints(cls)
    for key in content:
        if key not in hints:
            nearest = difflib.get_close_matches(str(key), hints, n=1)
            fix = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(hints)}"
            raise InputError(f"unknown key {key!r}", where=where, fix=fix)
    values = {key: _value(hints[key], value, f"{where}: {key}") for key, value in content.items()}
    try:
        return cls(**values)
    except TypeError:
        missing = [
            f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
        ]
        raise InputError(
            "keys are missing", where=where, expected=", ".join(n for n in missing if n not in values)
        ) from None


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`; InputError where it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(arguments[0], value, where)
    if origin is Literal:
        fits, expected = value in arguments, " | ".join(arguments)
    elif origin is tuple:
        return _sequence(arguments, value, where)
    elif hint is float:
        fits, expected = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        # YAML 1.1 takes 1e-3 for a string
        if not fits and isinstance(value, str):
            value, fits = _number(value)
        value = float(value) if fits else value
    else:
        fits, expected = type(value) is hint, hint.__name__
    if not fits:
        raise InputError("a value of another type", where=where, got=repr(value), expected=expected)
    return value


def _number(text: str) -> tuple[float | str, bool]:
    try:
        return float(text), True
    except ValueError:
        return text, False


def _sequence(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise InputError("a value of another type", where=where, got=repr(value), expected="a list")
    hints = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(hints) != len(value):
        raise InputError("wrong list length", where=where, got=len(value), expected=len(hints))
    return tuple(
        _value(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )
