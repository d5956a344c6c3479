"""A training run from a dense model to a sparse one, as a config says.

ProSparse (arXiv 2402.13516): 1. another activation, and training without L1 (stage 0); 2. L1 on
act(gate)·up with a factor that grows in stages. Before it, if wanted, a layer-wise warm start; threshold
shifting, its step 3, comes after training (`thresholds`). Everything can be killed and started again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from hotcold.errors import InputError, MismatchError
from hotcold.model.checkpoint import ffn_layers
from hotcold.model.limits import check_tokenizer
from hotcold.sparsify.activations import set_activation
from hotcold.sparsify.config import Config, Loss, ModelSize
from hotcold.sparsify.measure.evaluate import Quality, measure
from hotcold.sparsify.training.attention import use_grouped_attention
from hotcold.sparsify.training.objective import EndToEnd, LayerWise, output_spread
from hotcold.sparsify.training.rounding import bake, prepare_rounding, start_rounding
from hotcold.sparsify.training.schedule import TargetSparsity, cosine
from hotcold.sparsify.training.sources import heldout_windows, training_data
from hotcold.sparsify.training.state import WorkFolder
from hotcold.sparsify.training.trainer import Phase, Trainer, learning_rate

__all__ = ["PHASES", "Result", "check_size", "prosparse", "trained_model"]

PHASES = ["warm-start", "train"]
_SPREAD_WINDOWS = 8  # on which the spread of FFN outputs is measured
_PREFIX = "student."  # of parameters in an objective


@dataclass(frozen=True, slots=True)
class Result:
    """The sparse model in float32 on the CPU, and both models' quality on the test part of `heldout`."""

    model: PreTrainedModel
    dense: Quality
    sparse: Quality


def prosparse(
    load: Callable[[], PreTrainedModel],
    tokenizer: Tokenizer,
    config: Config,
    work: WorkFolder,
    observe: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Result | None:
    """Train the dense float32 model that `load` gives; returns the sparse one, None but on the main process.

    `observe` is told each record of the log as it is written. Raises MismatchError for a model of another
    size than the config's, InputError where a text is too short, DivergedError where the loss is no number.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    check_processes(config, accelerator.num_processes)
    test = heldout_windows(tokenizer, config, "test", config.heldout_tokens)
    calibration = heldout_windows(tokenizer, config, "calibrate", _SPREAD_WINDOWS * config.sequence)
    student = load()
    check_size(student, config.model)
    check_tokenizer(tokenizer, student)
    if accelerator.device.type == "cpu":
        use_grouped_attention(student)
    student.requires_grad_(False).to(accelerator.device)
    teacher = copy.deepcopy(student).to(torch.bfloat16 if _bf16(config) else None)
    data = training_data(teacher, tokenizer, config, work.path / "text", accelerator)
    dense = measure(student, test.to(accelerator.device))
    if accelerator.is_main_process:
        work.cut_log()

    def record(values: dict[str, Any]) -> None:
        work.log(values)
        observe(values)

    spread = output_spread(teacher, calibration.to(accelerator.device))
    trainer = Trainer(accelerator, config, data, work, record, student.config.intermediate_size)
    _train(trainer, student, teacher, spread, config)
    if not accelerator.is_main_process:
        return None
    sparse = trained_model(load(), config, work.last().tensors()[0])
    return Result(sparse, dense, measure(sparse, test))


def check_processes(config: Config, processes: int) -> None:
    """Refuse a batch that cannot be shared equally; InputError."""
    if config.batch % processes:
        expected = f"a multiple of {processes}, the number of processes"
        raise InputError("the batch cannot be shared", where="batch", got=config.batch, expected=expected)


def check_size(model: PreTrainedModel, size: ModelSize | None) -> None:
    """Refuse a model of another size than the config was made for; MismatchError."""
    found = ModelSize(
        model.config.num_hidden_layers, model.config.hidden_size, model.config.intermediate_size
    )
    if size is not None and found != size:
        raise MismatchError(
            "this config is for a model of another size", where="model", got=found, expected=size,
            fix="take another config, or delete `model` from it",
        )  # fmt: skip


def trained_model(
    dense: PreTrainedModel, config: Config, weights: Mapping[str, Tensor], *, rounded: bool = True
) -> PreTrainedModel:
    """`dense`, changed in place to the sparse model that has the trained `weights`.

    With `rounded`, weights are what Q4_0 makes of them if the config says that training ends so.
    """
    use_grouped_attention(dense)
    dense.requires_grad_(False)
    _prepare(dense, config)
    names = {name.removeprefix(_PREFIX): value for name, value in weights.items()}
    unexpected = dense.load_state_dict(names, strict=False).unexpected_keys
    if unexpected:
        raise MismatchError("weights of another model", where=unexpected[0])
    if rounded and config.quantize_step < config.steps:
        start_rounding(dense)
    bake(dense)
    return dense.requires_grad_(False).eval()


def _bf16(config: Config) -> bool:
    return config.precision == "bf16"


def _train(
    trainer: Trainer, student: PreTrainedModel, teacher: PreTrainedModel, spread: Tensor, config: Config
) -> None:
    """Both phases, as far as they are not done."""
    _prepare(student, config)
    if config.activation_checkpointing:
        # transformers 5.2x renamed it
        enable = (
            getattr(student, "activation_checkpointing_enable", None) or student.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
        student.train()  # transformers recomputes in training mode only; nothing is dropped in these models
    first, second = _warm_start(config), _end_to_end(config, student)
    if first.steps and not trainer.is_done(first):
        _learn_blocks(student)
        trainer.run(first, LayerWise(student, teacher, spread, bf16=_bf16(config)))
    if not trainer.is_done(second):
        _learn(student, config)
        with closing(EndToEnd(student, teacher, config.loss, spread, bf16=_bf16(config))) as objective:
            trainer.run(second, objective)


def _prepare(student: PreTrainedModel, config: Config) -> None:
    set_activation(student, config.activation)
    _learn(student, config)
    if config.quantize_step < config.steps:
        prepare_rounding(student)


def _learn(student: PreTrainedModel, config: Config) -> None:
    """Mark what learns end to end: every weight, or FFNs and norms."""
    if config.train == "all":
        student.requires_grad_(True)
        return
    _learn_blocks(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or "norm" in name)


def _learn_blocks(student: PreTrainedModel) -> None:
    student.requires_grad_(False)
    for layer in ffn_layers(student):
        layer.mlp.requires_grad_(True)


def _warm_start(config: Config) -> Phase:
    warm = config.warm_start
    return Phase(
        PHASES[0],
        warm.steps,
        lambda step: warm.lr * cosine(step, warm.steps, warm.warmup),
        Loss(lm=0.0, kl=0.0, ffn=1.0),
        lambda _: 0.0,
        milestones={warm.steps: "warm-start"} if config.checkpoints.stages else {},
    )


def _end_to_end(config: Config, student: PreTrainedModel) -> Phase:
    started: list[int] = []

    def before(step: int) -> None:
        if step > config.quantize_step and not started:
            started.append(step)
            start_rounding(student)

    return Phase(
        PHASES[1],
        config.steps,
        learning_rate(config.learning, config.steps),
        config.loss,
        _l1(config),
        before,
        _milestones(config) if config.checkpoints.stages else {},
    )


def _l1(config: Config) -> Callable[[int], float]:
    l1 = config.l1
    if l1.target_sparsity is None:
        return config.l1_schedule()
    return TargetSparsity(l1.target_sparsity, l1.start, l1.multiplier, l1.stages[0][1])


def _milestones(config: Config) -> dict[int, str]:
    """The last step of each L1 stage, and of all; stage 0 is the training of the new activation alone."""
    ends = {
        end: f"stage-{number}" for number, (_, end) in enumerate(config.l1.stages) if 0 < end < config.steps
    }
    return ends | {config.steps: "trained"}
