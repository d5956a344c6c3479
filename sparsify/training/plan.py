"""`--dry-run`: what a config will do to a model, before it costs anything.

Tokens and steps are exact. Memory and time are estimates from the model's sizes and stated assumptions, to
tell hours from weeks and one GPU from eight; the log of the first steps tells better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hotcold.errors import MismatchError
from hotcold.model import checkpoint
from hotcold.sparsify.config import GENERATED, Config, ModelSize

__all__ = ["Machine", "Size", "plan"]

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """What a device is assumed to do: bfloat16 products that training reaches, and sampling, per second."""

    name: str
    flops: float
    sampled_tokens_per_gflop: float


# 40 % of a data-center GPU's peak; what 2 cores with AVX512-BF16 gave (docs/log.md).
_MACHINES = (Machine("data-center GPU", 0.4 * 989e12, 8_000.0), Machine("2 CPU cores", 0.35e12, 125.0))


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters of a model: of its FFNs, of all layers with attention, and of embedding and head."""

    ffn: int
    layers: int
    embeddings: int
    n_layers: int
    d_model: int
    d_ff: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Size:
        """From a `config.json` of a Llama-like model; norms are left out."""
        n, d, d_ff = (config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
        heads = config["num_attention_heads"]
        head = config.get("head_dim") or d // heads
        attention = 2 * d * head * (heads + (config.get("num_key_value_heads") or heads))
        ffn = 3 * n * d * d_ff
        tables = 1 if config.get("tie_word_embeddings") else 2
        return cls(ffn, ffn + n * attention, tables * config["vocab_size"] * d, n, d, d_ff)

    @property
    def total(self) -> int:
        return self.layers + self.embeddings


def plan(model: str, config: Config) -> str:
    """The tables that the command prints. MismatchError for a model of another size than the config's."""
    size = Size.of(checkpoint.load_config(model))
    found = ModelSize(size.n_layers, size.d_model, size.d_ff)
    if config.model is not None and found != config.model:
        raise MismatchError(
            "this config is for a model of another size", where=model, got=found, expected=config.model
        )
    parts = (_stages(config), _texts(config), _memory(size, config), _time(size, config))
    return "\n\n".join("\n".join(part) for part in parts)


def _stages(config: Config) -> list[str]:
    lines = ["stage         lambda at its end    steps     until        tokens"]

    def row(name: str, factor: str, steps: int, until: int) -> str:
        return f"{name:<12}  {factor:>17}  {steps:>7,}  {until:>8,}  {steps * config.step_tokens:>12,}"

    if warm := config.warm_start.steps:
        lines.append(row("warm start", "-", warm, warm))
    begin, target = 0, config.l1.target_sparsity
    stages = config.l1.stages if target is None else config.l1.stages[:1]
    for number, (peak, end) in enumerate(stages):
        end = min(end, config.steps)
        if end > begin:
            lines.append(row(f"stage {number}", f"{peak:g}", end - begin, end))
            begin = end
    if begin < config.steps:
        factor = f"{stages[-1][0]:g}" if target is None else f"for {target:.0%} sparse"
        lines.append(row("last", factor, config.steps - begin, config.steps))
    if config.quantize_step < config.steps:
        lines.append(f"Q4_0 rounding after step {config.quantize_step:,}")
    return lines


def _texts(config: Config) -> list[str]:
    total, tokens = sum(text.share for text in config.text), config.steps * config.step_tokens
    lines = ["text                                       share        tokens"]
    for text in config.text:
        share = text.share / total
        lines.append(f"{text.source:<40}  {share:>6.1%}  {share * tokens:>12,.0f}")
        if text.source == GENERATED:
            lines.append(f"{'  of which are different':<48}  {config.generated.tokens:>12,}")
    return lines


def _memory(size: Size, config: Config) -> list[str]:
    """Bytes on a device that holds everything; FSDP divides all but activations and the dense model."""
    trained = size.total if config.train == "all" else size.ffn
    tokens = config.micro_batch * config.sequence
    per_layer = tokens * (16 * size.d_model + 8 * size.d_ff)  # bfloat16, and float32 norms
    kept = tokens * size.n_layers * 2 * size.d_model + per_layer
    activations = kept if config.activation_checkpointing else size.n_layers * per_layer
    parts = {
        "weights, float32": 4 * size.total,
        "gradients, float32": 4 * trained,
        "AdamW, float32": 8 * trained,
        "dense model, bfloat16": 2 * size.total if config.has_teacher else 0,
        "activations (estimate)": activations,
    }
    lines = [f"{name:<24}  {size / _GIB:>8.2f} GiB" for name, size in parts.items() if size]
    return ["memory", *lines, f"{'in all':<24}  {sum(parts.values()) / _GIB:>8.2f} GiB"]


def _time(size: Size, config: Config) -> list[str]:
    tokens = config.steps * config.step_tokens
    forward = 2 * (size.layers + size.embeddings)
    backward = 2 * forward if config.train == "all" else 2 * (size.layers + size.ffn)
    backward += forward if config.activation_checkpointing else 0
    teacher = forward if config.loss.kl or config.loss.ffn else 0
    train = tokens * (forward + backward + teacher)
    warm = config.warm_start.steps * config.step_tokens * (2 * size.layers + 6 * size.ffn)
    written = config.generated.tokens if any(t.source == GENERATED for t in config.text) else 0
    lines = ["time (estimate)"]
    for machine in _MACHINES:
        sampling = written * forward / 1e9 / machine.sampled_tokens_per_gflop
        hours = ((train + warm) / machine.flops + sampling) / 3600
        lines.append(f"{machine.name:<24}  {hours:>10,.2f} hours")
    return lines
