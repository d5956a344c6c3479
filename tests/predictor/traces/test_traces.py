"""Broken trace folders are refused with the file and the field that is wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hotcold.cli import main
from hotcold.errors import FormatError, HotcoldError, InputError, MismatchError
from hotcold.predictor.traces.reader import TraceRun, Traces


@pytest.fixture
def copy(traces: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(traces, tmp_path / "copy"))


SHARD = "layer-001/shard-000003.safetensors"


def _edit_run(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "run.json").read_text()) | changes
        values = {name: value for name, value in values.items() if value is not ...}
        (folder / "run.json").write_text(json.dumps(values))

    return edit


def _edit_file(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        data = change(path.read_bytes())
        path.unlink() if data is None else path.write_bytes(data)

    return edit


def _edit_shard(**tensors: np.ndarray | None) -> Callable[[Path], None]:
    """Replace tensors of a shard (None: remove), and make the manifest agree."""

    def edit(folder: Path) -> None:
        path = folder / SHARD
        new = {name: value for name, value in {**load_file(path), **tensors}.items() if value is not None}
        save_file(new, path)
        data, lines = path.read_bytes(), (folder / "manifest.jsonl").read_text().splitlines()
        entry = json.loads(lines[7]) | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        lines[7] = json.dumps(entry)
        (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")

    return edit


def _flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _double_last(data: bytes) -> bytes:
    return data + data.splitlines(keepends=True)[-1]


def _swap_lines(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join([lines[1], lines[0], *lines[2:]])


BROKEN = {
    "no run.json": (_edit_file("run.json", lambda _: None), InputError, "no traces here"),
    "run.json cut": (_edit_file("run.json", lambda d: d[:50]), FormatError, "run.json, content: is not JSON"),
    "run.json a list": (_edit_file("run.json", lambda _: b"[]"), FormatError, "is not a JSON object"),
    "other format": (_edit_run(format="x"), FormatError, "run.json, format: not of this format .got 'x'"),
    "later version": (_edit_run(version=3), FormatError, "run.json, version: .*got 3, expected 2"),
    "two parts": (_edit_run(version=1), FormatError, "version: traces from an older .*run collect-traces"),
    "no d_ff": (_edit_run(d_ff=...), FormatError, "run.json, d_ff: wrong or missing .got None"),
    "d_ff text": (_edit_run(d_ff="44"), FormatError, "run.json, d_ff: .*got '44', expected int"),
    "d_ff bool": (_edit_run(d_ff=True), FormatError, "run.json, d_ff: .*got True"),
    "no layers": (_edit_run(n_layers=0), FormatError, "run.json, n_layers: must be positive"),
    "unknown field": (_edit_run(color="red"), FormatError, "run.json, color: .*no such field"),
    "no tokens": (_edit_file("tokens.safetensors", lambda _: None), FormatError, "safetensors: missing"),
    "tokens cut": (_edit_file("tokens.safetensors", lambda d: d[:90]), FormatError, "not a safetensors file"),
    "other tokens": (_edit_file("tokens.safetensors", _flip_last), MismatchError, "belongs to a different"),
    "fewer tokens": (_edit_run(n_tokens=2999), FormatError, "got int32 .3000., expected int32 .2999."),
    "no manifest": (_edit_file("manifest.jsonl", lambda _: None), InputError, "30 shards are missing"),
    "manifest cut": (_edit_file("manifest.jsonl", lambda d: d[:-9]), InputError, "1 shards are missing"),
    "line not JSON": (_edit_file("manifest.jsonl", lambda d: b"{\n" + d), FormatError, "line 1: is not JSON"),
    "line lacks": (_edit_file("manifest.jsonl", lambda d: b"{}\n" + d), FormatError, "line 1, layer: wrong"),
    "lines swapped": (_edit_file("manifest.jsonl", _swap_lines), FormatError, "line 1: out of order"),
    "line twice": (_edit_file("manifest.jsonl", _double_last), FormatError, "line 31: out of order"),
    "no shard": (_edit_file(SHARD, lambda _: None), FormatError, f"{SHARD}: listed in the manifest"),
    "shard cut": (_edit_file(SHARD, lambda d: d[:99]), FormatError, f"{SHARD}, bytes: truncated .*got 99"),
    "shard altered": (_edit_file(SHARD, _flip_last), FormatError, f"{SHARD}, sha256: damaged"),
    "no x": (_edit_shard(x=None), FormatError, f"{SHARD}, x: missing tensor"),
    "x narrow": (_edit_shard(x=np.zeros((200, 31), "f2")), FormatError, f"{SHARD}, x: .*200, 31"),
    "x float32": (_edit_shard(x=np.zeros((200, 32), "f4")), FormatError, f"{SHARD}, x: .*got float32"),
    "active short": (_edit_shard(active=np.zeros((199, 6), "u1")), FormatError, f"{SHARD}, active: .*199"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_traces_name_file_and_field(
    copy: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, error, message = BROKEN[name]
    edit(copy)
    with pytest.raises(error, match=message):
        Traces(copy).layer(1)
    assert (
        main(["train-predictors", "--traces", str(copy), "--out", str(tmp_path / "p"), "--epochs", "1"]) == 2
    )
    assert capsys.readouterr().err.count("error:") == 1 and not (tmp_path / "p").exists()


def test_a_missing_folder_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make them with collect-traces"):
        Traces(tmp_path / "nowhere")


def test_every_flipped_byte_of_a_shard_is_seen(copy: Path) -> None:
    shard, path = Traces(copy).shards[7], copy / SHARD
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 200)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 128]) + whole[position + 1 :])
        with pytest.raises(FormatError, match="damaged shard"):
            shard.read(copy)


def test_run_survives_its_own_json(copy: Path) -> None:
    run = TraceRun.read(copy)
    (copy / "run.json").write_text(json.dumps(run.to_json()))
    assert TraceRun.read(copy) == run


def test_shards_tile_the_tokens(traces: Path) -> None:
    run = TraceRun.read(traces)
    assert run.n_shards == 15
    slices = [run.shard_slice(shard) for shard in range(run.n_shards)]
    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(run.n_tokens))


def test_starts_are_the_first_tokens_of_windows(traces: Path) -> None:
    opened = Traces(traces)
    run, starts = opened.run, opened.starts()
    lengths = np.diff([*np.flatnonzero(starts), run.n_tokens])
    assert starts[0] and lengths.max() == run.window and lengths.sum() == run.n_tokens
    assert starts[np.flatnonzero(np.diff(opened.document)) + 1].all()  # every document begins without context
    assert starts[:: run.shard_tokens].all()


def test_errors_are_of_the_one_family() -> None:
    assert all(issubclass(error, HotcoldError) for _, error, _ in BROKEN.values())
