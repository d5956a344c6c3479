"""Plans on disk: JSON beside the bundle, and PowerInfer's `.gpuidx`, which holds the same neurons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hotcold.convert.powerinfer.gpu_index import GpuIndex
from hotcold.errors import FormatError, InputError, MismatchError
from hotcold.files.gguf_split import open_gguf
from hotcold.files.json import read_json
from hotcold.ownership import beside, check_file
from hotcold.runtime.placement.plan import PlacedLayer, Placement
from hotcold.storage import write_json

__all__ = ["gpuidx_path", "load_placement", "plan_path", "save_placement"]

_FORMAT, _VERSION = "hotcold-placement", 1
_MAX_BYTES = 1 << 28


def plan_path(bundle: str | Path, mode: str, budgets: Sequence[int]) -> Path:
    """Where a plan of these budgets is saved: beside the bundle, which itself stays as its manifest says."""
    sizes = "+".join(str(budget >> 20) for budget in budgets)
    return beside(bundle, f".{mode}-{sizes}MiB.placement.json")


def gpuidx_path(plan: str | Path) -> Path:
    """Where the `.gpuidx` of a plan is written."""
    return Path(str(plan).removesuffix(".json") + ".generated.gpuidx")


def save_placement(placement: Placement, path: str | Path, fingerprint: str | None = None) -> None:
    """Write the plan to `path`, and its `.gpuidx` beside.

    StorageError if the disk does not take them, or files that hotcold did not write are in the way.
    """
    check_file(path, "placement")
    check_file(gpuidx_path(path), "gpuidx")
    layers = [
        {
            "on_device": layer.on_device,
            "device": layer.device,
            "hit_rate": layer.hit_rate,
            "device_bytes": layer.device_bytes,
            "cpu_bytes": layer.cpu_bytes,
            "hot": layer.hot.tolist(),
        }
        for layer in placement.layers
    ]
    write_json(path, {
        "format": _FORMAT,
        "version": _VERSION,
        "model_fingerprint": fingerprint,
        "method": placement.method,
        "budget": sum(placement.budgets),
        "budgets": placement.budgets,
        "fixed_bytes": sum(placement.fixed),
        "fixed": placement.fixed,
        "tokens_per_second": placement.tokens_per_second,
        "d_ff": placement.layers[0].d_ff,
        "settings": placement.settings,
        "layers": layers,
    })  # fmt: skip
    buckets = [layer.hot for layer in placement.layers]
    GpuIndex(buckets, placement.layers[0].d_ff, sum(placement.budgets)).write(gpuidx_path(path))


def load_placement(path: str | Path, n_layers: int, d_ff: int, fingerprint: str | None = None) -> Placement:
    """Read a plan, or a `.gpuidx`, for a model of this shape.

    Raises InputError for a missing file, FormatError for a broken one, MismatchError for another model's.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such plan", where=path)
    if path.suffix == ".gpuidx":
        index = GpuIndex.read(open_gguf(path))
        layers = [PlacedLayer(True, hot, index.d_ff) for hot in index.buckets]
        placement, of = Placement(tuple(layers), (index.vram_capacity,), method="gpuidx"), None
    else:
        placement, of = _from_json(path)
    got = (len(placement.layers), placement.layers[0].d_ff)
    if got != (n_layers, d_ff):
        what = "this plan is for another model: (n_layers, d_ff) differs"
        raise MismatchError(what, where=path, got=got, expected=(n_layers, d_ff))
    if of and fingerprint and of != fingerprint:
        what = "this plan is for another model: the fingerprint differs"
        raise MismatchError(what, where=path, got=of, expected=fingerprint)
    return placement


def _from_json(path: Path) -> tuple[Placement, str | None]:
    if path.stat().st_size > _MAX_BYTES:
        raise FormatError("too large for a plan", where=path, got=path.stat().st_size)
    value = read_json(path)
    if value.get("format") != _FORMAT or value.get("version") != _VERSION:
        raise FormatError("not a plan of this version", where=path, field="format")
    try:
        layers = [_layer(entry, int(value["d_ff"]), path, i) for i, entry in enumerate(value["layers"])]
        # A plan from before there were several devices has totals only.
        budgets = tuple(map(int, value.get("budgets", [int(value["budget"])])))
        fixed = tuple(map(int, value.get("fixed", [int(value["fixed_bytes"])])))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError("a field is missing or has the wrong type", where=path, got=error) from error
    framed = [layer.on_device for layer in layers]
    if not layers or framed != sorted(framed, reverse=True):
        raise FormatError("layers on the device must come first", where=path, field="layers")
    homes = [layer.device for layer in layers if layer.on_device]
    if homes != sorted(homes) or not set(homes) <= set(range(len(budgets))):
        raise FormatError("layers must be assigned to devices in order", where=path, field="layers")
    if len(fixed) != len(budgets) or not budgets:
        raise FormatError("there must be one size per device", where=path, field="budgets")
    return Placement(tuple(layers), budgets, fixed, method="file"), value.get("model_fingerprint")


def _layer(entry: dict[str, Any], d_ff: int, path: Path, i: int) -> PlacedLayer:
    hot = np.asarray(entry["hot"], np.int64).reshape(-1)
    ascending = (np.diff(hot) > 0).all() and (not len(hot) or (hot[0] >= 0 and hot[-1] < d_ff))
    if not ascending or (len(hot) and not entry["on_device"]):
        what = "hot neurons must be ascending, below d_ff, and on the device"
        raise FormatError(what, where=path, field=f"layers[{i}].hot")
    figures = {name: entry[name] for name in ("hit_rate", "device_bytes", "cpu_bytes")}
    device = int(entry.get("device", 0))
    return PlacedLayer(bool(entry["on_device"]), hot.astype(np.int32), d_ff, **figures, device=device)
