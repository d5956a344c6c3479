"""What collect-traces records is what the model does, whichever way it is cut into shards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hotcold.cli import main
from hotcold.errors import InputError
from hotcold.model import checkpoint
from hotcold.predictor.traces.collect import collect, gather_tokens
from hotcold.predictor.traces.reader import TraceRun, Traces, tokens_digest, windows
from hotcold.predictor.traces.writer import TraceWriter

D_MODEL, D_FF, N_LAYERS = 32, 44, 2  # of the fixture `model`


def _by_hand(model: Path, traces: Traces, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """x and active of one layer from whole hidden states and the FFN's own weights, without hooks."""
    loaded = checkpoint.load_model(str(model))
    ffn = checkpoint.ffn_layers(loaded)[layer]
    xs, actives = [], []
    run = traces.run
    for shard in range(run.n_shards):
        tokens = run.shard_slice(shard)
        for rows in windows(traces.document[tokens], run.window):
            ids = torch.from_numpy(traces.ids[tokens][rows].astype(np.int64))[None]
            with torch.no_grad():
                states = loaded(ids, output_hidden_states=True).hidden_states[layer]
                block = loaded.model.layers[layer]
                positions = torch.arange(ids.shape[1])[None]
                attended = block.self_attn(
                    block.input_layernorm(states),
                    position_embeddings=loaded.model.rotary_emb(states, positions),
                    attention_mask=torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None],
                )[0]
                x = (states + attended)[0]
                active = torch.relu(ffn.gate(ffn.norm(x))) * ffn.up(ffn.norm(x)) != 0
            xs.append(x.numpy())
            actives.append(active.numpy())
    return np.concatenate(xs), np.concatenate(actives)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_records_what_the_ffn_sees_and_does(model: Path, traces: Path, layer: int) -> None:
    opened = Traces(traces)
    x, packed = opened.layer(layer)
    expected_x, expected_active = _by_hand(model, opened, layer)
    np.testing.assert_allclose(x, expected_x, rtol=2e-3, atol=2e-3)
    active = np.unpackbits(packed, axis=1, count=D_FF, bitorder="little").astype(bool)
    assert np.mean(active != expected_active) < 1e-4  # only where a gate is 0 to rounding
    assert 0.2 < active.mean() < 0.8
    assert opened.sparsity()[layer] == pytest.approx(1 - active.mean())


def test_shapes_split_and_documents(traces: Path) -> None:
    opened = Traces(traces)
    assert (opened.run.n_layers, opened.run.d_model, opened.run.d_ff) == (N_LAYERS, D_MODEL, D_FF)
    assert opened.part.tolist() == [0] * 2700 + [1] * 150 + [2] * 150
    of_parts = [set(opened.document[opened.part == part].tolist()) for part in range(3)]
    assert sum(map(len, of_parts)) == len(set.union(*of_parts))
    assert (np.diff(opened.document) >= 0).all()


def test_text_comes_from_the_right_parts(model: Path, text: Path) -> None:
    from hotcold.text import PARTS, documents

    tokenizer = checkpoint.load_tokenizer(str(model))
    tokens = gather_tokens(str(text), tokenizer, 2000)
    for number, part in enumerate(PARTS):
        ids = tokens["ids"][tokens["part"] == number]
        expected = "".join(document.text for document in documents(str(text), part))
        assert expected.startswith(tokenizer.decode(ids.tolist()))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 9))
def test_windows_cover_every_token_once_within_one_document(lengths: list[int], window: int) -> None:
    document = np.repeat(np.arange(len(lengths)), lengths)
    cut = list(windows(document, window))
    assert [i for rows in cut for i in range(rows.start, rows.stop)] == list(range(len(document)))
    assert all(len(set(document[rows])) == 1 and rows.stop - rows.start <= window for rows in cut)
    assert len(cut) == sum(-(-length // window) for length in lengths)


def test_json_report_agrees_with_the_shards(
    model: Path, text: Path, traces: Path, capsys: pytest.CaptureFixture[str], collect_arguments: Callable
) -> None:
    assert main([*collect_arguments(model, text, traces), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["layers"] == pytest.approx(Traces(traces).sparsity().tolist())
    assert report["sparsity"] == pytest.approx(np.mean(report["layers"])) and report["clipped"] == 0


def test_table_has_a_row_per_layer(
    model: Path,
    text: Path,
    traces: Path,
    capsys: pytest.CaptureFixture[str],
    collect_arguments: Callable,
    snapshot: Callable,
) -> None:
    before = snapshot(traces)
    assert main(collect_arguments(model, text, traces)) == 0
    assert capsys.readouterr().out.count("\n|") == N_LAYERS + 2
    assert snapshot(traces) == before


def _direct(model: Path, text: Path, out: Path, change: Callable) -> list:
    """Collect 300 tokens with a model that `change` has altered; returns the manifest."""
    loaded = checkpoint.load_model(str(model))
    change(loaded)
    tokens = gather_tokens(str(text), checkpoint.load_tokenizer(str(model)), 300)
    run = TraceRun(
        "tiny", "f" * 64, N_LAYERS, D_MODEL, D_FF, "relu", "t", tokens_digest(tokens), 300, 100, 64, 1
    )
    with TraceWriter.open(out, run, tokens) as writer:
        collect(loaded, checkpoint.ffn_layers(loaded), tokens, writer)
        return writer.shards


def test_values_beyond_float16_are_clipped_and_counted(model: Path, text: Path, tmp_path: Path) -> None:
    shards = _direct(model, text, tmp_path / "t", lambda m: m.model.embed_tokens.weight.data.mul_(3e5))
    x, _ = Traces(tmp_path / "t").layer(0)
    assert np.isfinite(x).all() and np.abs(x.astype(np.float32)).max() == 65504
    assert sum(shard.clipped for shard in shards if shard.layer == 0) == np.count_nonzero(np.abs(x) == 65504)


def test_activations_that_are_not_finite_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layer 0: activations are not finite"):
        _direct(model, text, tmp_path / "t", lambda m: m.model.embed_tokens.weight.data.fill_(float("nan")))
    assert not (tmp_path / "t" / "manifest.jsonl").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tokens", "0", r"--tokens: must be positive .got 0."),
        ("--tokens", "2", r"too few tokens for three parts .got 2."),
        (
            "--tokens",
            "99999999",
            r"salad.txt: the text is too short for its train part .got \d+ tokens, expected",
        ),
        ("--window", "-3", r"--window: must be positive .got -3."),
        ("--shard-tokens", "0", r"--shard-tokens: must be positive"),
        ("--text", "no.txt", r"no.txt: no such file"),
        ("--model", "no/such/model/here", r"no such model"),
    ],
)
def test_bad_arguments_exit_with_one_line(
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    message: str,
    collect_arguments: Callable,
) -> None:
    assert main([*collect_arguments(model, text, tmp_path / "out"), option, value]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1 and not (tmp_path / "out" / "run.json").exists()


def test_resuming_with_something_else_names_both(
    model: Path,
    text: Path,
    traces: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    collect_arguments: Callable,
    snapshot: Callable,
    write_model: Callable,
    write_text: Callable,
) -> None:
    other_model, other_text = (
        write_model(tmp_path / "other", seed=1),
        write_text(tmp_path / "other.txt", seed=1),
    )
    before = snapshot(traces)
    cases = [
        (collect_arguments(other_model, text, traces), ["another model", "'other' (", "'tiny' ("]),
        (collect_arguments(model, other_text, traces), ["another text", "other.txt' (", "salad.txt' ("]),
        (collect_arguments(model, text, traces, tokens=2000), ["another number of tokens", "2000", "3000"]),
        (
            [*collect_arguments(model, text, traces), "--window", "32"],
            ["another window", "got 32, expected 64"],
        ),
    ]
    for arguments, said in cases:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in said), error
    assert snapshot(traces) == before


def test_a_folder_with_other_things_is_refused(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], collect_arguments: Callable
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert main(collect_arguments(model, text, tmp_path)) == 2
    assert "not empty, and hotcold did not write it" in capsys.readouterr().err
