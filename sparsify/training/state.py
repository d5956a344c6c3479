"""The working folder of a training run: its log, and states to go on from after a kill at any moment.

A state appears as a whole or not at all (`storage.atomic_directory`), and the older one is deleted only after
that. Tensors are safetensors, the rest is JSON. The log is cut back to the state that a run goes on from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from hotcold import storage
from hotcold.errors import FormatError, HotcoldError, MismatchError
from hotcold.files.json import read_json, read_json_lines
from hotcold.ownership import check_growing

__all__ = ["Saved", "WorkFolder", "flat_optimizer", "nested_optimizer"]

_FORMAT, _VERSION = "hotcold-training", 1
_STATE, _MODEL, _OPTIMIZER = "manifest.json", "model.safetensors", "optimizer.safetensors"
_STATE_FORMAT = {"format": "hotcold-state", "version": 1}


@dataclass(frozen=True, slots=True)
class Saved:
    """A state on disk: `step` of `phase` is done."""

    path: Path
    phase: str
    step: int
    extra: dict[str, Any]

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The trained parameters and the optimizer's state, by name."""
        return load_file(self.path / _MODEL), load_file(self.path / _OPTIMIZER)


class WorkFolder:
    """`run.json`, `training.jsonl` and `state-PHASE-STEP/` of one run.

    `identity` says what is trained on what. MismatchError if the folder belongs to another run,
    StorageError if it is not a working folder at all.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], phases: list[str], keep: int = 2) -> None:
        self.path, self.phases, self._keep = path, phases, keep
        self.log_path = path / "training.jsonl"
        run = {"format": _FORMAT, "version": _VERSION, **identity}
        check_growing(path, "training")
        if (path / "run.json").is_file():
            self._refuse_other(read_json(path / "run.json"), run)
        else:
            storage.write_json(path / "run.json", run)

    def _refuse_other(self, found: dict[str, Any], run: dict[str, Any]) -> None:
        for key, value in run.items():
            if found.get(key) != value:
                raise MismatchError(
                    f"this is the working folder of another run: its {key} differs", where=self.path,
                    got=found.get(key), expected=value, fix="delete it to start over, or use another --out",
                )  # fmt: skip

    def states(self) -> list[Saved]:
        """All states, oldest first. One without its description is on its way to being deleted."""
        found = [self._read(path) for path in self._state_folders() if (path / _STATE).is_file()]
        return sorted(found, key=lambda saved: (self.phases.index(saved.phase), saved.step))

    def _state_folders(self) -> list[Path]:
        """Folders under the very names that `save` gives: others are somebody else's, such as copies."""
        phases = "|".join(map(re.escape, self.phases))
        name = re.compile(rf"state-(?:{phases})-\d{{6,}}")
        return [path for path in self.path.glob("state-*") if name.fullmatch(path.name) and path.is_dir()]

    def last(self) -> Saved | None:
        """The newest state."""
        return states[-1] if (states := self.states()) else None

    def _read(self, path: Path) -> Saved:
        try:
            state = read_json(path / _STATE)
            phase, step, extra = state["phase"], state["step"], state["extra"]
        except (HotcoldError, KeyError) as error:
            raise FormatError("not a training state", where=path, got=str(error), fix="delete it") from error
        if phase not in self.phases or type(step) is not int or not isinstance(extra, dict):
            raise FormatError("not a training state", where=path, got=f"{phase}, {step}", fix="delete it")
        if path.name != _name(phase, step):
            got, fix = f"step {step} of {phase}", "delete it, or restore its name"
            raise FormatError("this state has the wrong file name", where=path, got=got, fix=fix)
        return Saved(path, phase, step, extra)

    def save(
        self,
        phase: str,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        extra: Mapping[str, Any],
    ) -> None:
        """Write a state, then delete those that are too old."""
        with storage.atomic_directory(self.path / _name(phase, step), "state") as folder:
            save_file(_once(model), folder / _MODEL)
            save_file(dict(optimizer), folder / _OPTIMIZER)
            state = {**_STATE_FORMAT, "phase": phase, "step": step, "extra": dict(extra)}
            storage.write_json(folder / _STATE, state)
        for old in self.states()[: -self._keep]:
            _delete(old.path)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record to the log."""
        storage.append_line(self.log_path, json.dumps(record))

    def records(self) -> list[dict[str, Any]]:
        """The log so far; a last line cut by a kill is not there."""
        return read_json_lines(self.log_path)

    def _place(self, record: Mapping[str, Any], line: int) -> tuple[int, int]:
        """Phase and step of a record, in the order of the run; FormatError if it has none."""
        phase, step = record.get("phase"), record.get("step")
        if phase not in self.phases or type(step) is not int:
            fix = "delete this line"
            raise FormatError("not a record", where=self.log_path, field=f"line {line}", fix=fix)
        return self.phases.index(phase), step

    def keep_stage(self, name: str, model: Mapping[str, Tensor]) -> None:
        """Keep the trained parameters as they are at the end of a stage of the method."""
        with storage.atomic_file(self.stage(name)) as file:
            storage.fs.write(file, save(_once(model)))

    def stage(self, name: str) -> Path:
        """The file of a stage."""
        return self.path / "stages" / f"{name}.safetensors"

    def cut_log(self) -> None:
        """Forget what was logged after the last state, as it will be done again, and states half deleted."""
        for half in self._state_folders():
            if not (half / _STATE).exists():
                _delete(half)
        if not self.log_path.is_file():
            return
        saved = self.last()
        last = (-1, 0) if saved is None else (self.phases.index(saved.phase), saved.step)
        kept = [r for n, r in enumerate(self.records(), start=1) if self._place(r, n) <= last]
        storage.write_bytes(self.log_path, "".join(json.dumps(r) + "\n" for r in kept).encode())


def _name(phase: str, step: int) -> str:
    return f"state-{phase}-{step:06d}"


def _delete(state: Path) -> None:
    storage.remove_files(state, [_STATE, _MODEL, _OPTIMIZER])


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, those that share memory (a head tied to the embedding) under their first name."""
    owners: dict[int, str] = {}
    return {
        name: tensor.contiguous()
        for name, tensor in tensors.items()
        if owners.setdefault(tensor.data_ptr(), name) == name
    }


def flat_optimizer(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """An optimizer's state by parameter and key as one level of tensors, `PARAMETER/KEY`."""
    return {
        f"{name}/{key}": torch.as_tensor(value).contiguous()
        for name, values in state["state"].items()
        for key, value in values.items()
    }


def nested_optimizer(flat: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `flat_optimizer`, with the settings of the running optimizer's one group."""
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in flat.items():
        parameter, _, key = name.rpartition("/")
        state.setdefault(parameter, {})[key] = value
    return {"state": state, "param_groups": [{**groups[0], "params": list(state)}]}
