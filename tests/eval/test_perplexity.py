"""Perplexity, its error and the distances, against torch and against distributions worked out by hand."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hotcold.cli import main
from hotcold.errors import InputError
from hotcold.eval import perplexity as module
from hotcold.eval.perplexity import compare, perplexity
from hotcold.eval.sides import EngineSide
from hotcold.eval.windows import load_tokenizer, text_ids, windows
from hotcold.runtime.reference import ReferenceEngine

from .conftest import make_text


class Table:
    """A side whose logits are given: row t of `logits` follows the token at position t of any window."""

    n_ctx, seconds = 64, 0.0

    def __init__(self, logits):
        self.logits = np.asarray(logits, dtype=np.float32)
        self.n_vocab = self.logits.shape[1]

    def reset(self):
        pass

    def prefill(self, ids, all_logits=False):
        return self.logits[: len(ids)] if all_logits else self.logits[len(ids) - 1]


def reference_side(bundle, mode):
    return EngineSide(ReferenceEngine.load(bundle, mode, n_threads=1, n_ctx=64))


@pytest.fixture
def cut(bundle, text_file):
    tokenizer = load_tokenizer(bundle)
    return windows(text_ids(str(text_file), tokenizer, 256), 32, tokenizer)


def test_equals_the_cross_entropy_of_transformers(bundle, cut):
    from hotcold.model.checkpoint import load_model

    model = load_model(str(bundle.parent / "model"))
    with torch.no_grad():
        losses = [model(x, labels=x).loss.item() for x in (torch.tensor(ids[None]).long() for ids in cut)]
    found = perplexity(reference_side(bundle, "exact"), cut)
    assert found.ppl == pytest.approx(math.exp(np.mean(losses)), rel=2e-3)
    assert found.tokens == len(cut) * 31


def test_uniform_guesses_have_the_perplexity_of_the_vocabulary():
    found = perplexity(Table(np.zeros((8, 50))), [np.arange(8)])
    assert found.ppl == pytest.approx(50, rel=1e-5)
    assert found.stderr == pytest.approx(0, abs=1e-4)
    assert found.same_top is None and found.kl is None


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 200), scale=st.floats(0.1, 60))
def test_error_and_distances_follow_their_definitions(seed, n, scale):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 7, n + 1)
    truth, guess = rng.normal(size=(2, n + 1, 7)).astype(np.float32) * scale
    found = compare({"t": Table(truth), "g": Table(guess)}, [ids], reference="t")
    log_t, log_g = (torch.log_softmax(torch.tensor(x[:-1]).double(), 1).numpy() for x in (truth, guess))
    nll = -log_g[np.arange(n), ids[1:]]
    assert found["g"].ppl == pytest.approx(math.exp(nll.mean()), rel=1e-3)
    stderr = found["g"].ppl * nll.std(ddof=1) / math.sqrt(n)
    assert found["g"].stderr == pytest.approx(stderr, rel=1e-3, abs=1e-6)
    assert found["g"].kl == pytest.approx((np.exp(log_t) * (log_t - log_g)).sum(1).mean(), rel=1e-3, abs=1e-5)
    assert found["g"].same_top == pytest.approx((log_t.argmax(1) == log_g.argmax(1)).mean())
    assert found["t"].kl is None


@pytest.mark.parametrize(
    "row, message",
    [
        ([1, np.nan, 0], "logits that are not finite"), ([np.inf, 0, 0], "logits that are not finite"),
        ([-np.inf] * 3, "logits that are not finite"), ([0, -np.inf, 0], "perplexity is not finite"),
        ([2000, 0, 2000], "perplexity is not finite"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused(row, message):
    """Token 1 comes next: it may not be impossible, nor so unlikely that exp overflows."""
    with pytest.raises(InputError, match=message):
        perplexity(Table([row, row]), [np.array([0, 1])])


def test_a_token_that_both_mask_is_no_distance():
    masked = Table(np.float32([[1, 2, -np.inf]] * 2))
    found = compare({"a": masked, "b": Table(masked.logits)}, [np.array([0, 1])], "b")
    assert (found["a"].kl, found["a"].same_top) == (0, 1)
    unmasked = Table(np.float32([[1, 2, 3]] * 2))
    assert 0 < compare({"a": unmasked, "b": masked}, [np.array([0, 1])], "b")["a"].kl < 3
    with pytest.raises(InputError, match="KL divergence"):  # what the reference says, the other never does
        compare({"a": masked, "b": unmasked}, [np.array([0, 1])], "b")


def test_huge_logits_do_not_overflow():
    logits = np.array([[1e4, -1e4], [-1e4, 1e4], [0, 0]])
    found = compare({"a": Table(logits), "b": Table(logits)}, [np.array([0, 0, 1])], reference="a")
    assert (found["b"].ppl, found["b"].kl, found["b"].same_top) == (1.0, 0.0, 1.0)


def test_blocks_of_rows_change_nothing(bundle, cut, monkeypatch):
    side = reference_side(bundle, "exact")
    whole = perplexity(side, cut)
    monkeypatch.setattr(module, "_ROWS", 5)
    assert perplexity(side, cut).ppl == pytest.approx(whole.ppl, rel=1e-6)


def test_predictors_that_miss_nothing_cost_nothing(bundle, cut):
    sides = {mode: reference_side(bundle, mode) for mode in ("exact", "predicted")}
    found = compare(sides, cut, reference="exact")
    assert found["predicted"].kl == pytest.approx(0, abs=1e-6)
    assert found["predicted"].same_top == 1.0


def test_predictors_that_miss_neurons_show_in_the_distance(lossy_bundle, cut):
    sides = {mode: reference_side(lossy_bundle, mode) for mode in ("exact", "predicted")}
    found = compare(sides, cut, reference="exact")
    assert found["predicted"].kl > 1e-4


def run(*arguments):
    return main(["perplexity", *map(str, arguments)])


def test_command_prints_one_json_object_per_mode(bundle, text_file, capsys):
    options = ("--tokens", 256, "--window", 32, "-t", 1, "--json", "--gguf", bundle / "tiny.gguf")
    assert run("--bundle", bundle, "--text", text_file, "--mode", "llama.cpp", *options) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["mode"] for entry in found] == ["llama.cpp", str(bundle / "tiny.gguf")]
    assert {tuple(entry) for entry in found} == {("mode", "ppl", "stderr", "tokens")}
    assert found[0]["ppl"] == found[1]["ppl"]  # the same file both times
    assert found[0]["tokens"] == 8 * 31


def test_distances_to_a_reference(lossy_bundle, text_file, capsys):
    options = ("--bundle", lossy_bundle, "--text", text_file, "--tokens", 256, "--window", 32, "-t", 1)
    modes = ("--mode", "dense,exact,predicted,llama.cpp", "--reference", "dense")
    assert run(*options, *modes, "--json") == 0
    found = {entry["mode"]: entry for entry in map(json.loads, capsys.readouterr().out.splitlines())}
    assert "kl" not in found["dense"]
    assert found["exact"]["kl"] < 1e-4 and found["llama.cpp"]["kl"] < 1e-3
    assert found["predicted"]["kl"] > 10 * found["exact"]["kl"]
    assert run(*options, "--mode", "exact", "--reference", "dense") == 0
    assert re.search(r"KL\(dense ‖ exact\) 0\.0000\d nats, same top token 100\.0%", capsys.readouterr().out)


def test_what_leaving_inputs_out_costs(bundle, text_file, capsys):
    options = ("--bundle", bundle, "--text", text_file, "--tokens", 256, "--window", 32, "-t", 1)
    assert run(*options, "--mode", "exact", "--reference", "exact", "--input-sparsity", 0.5, "--json") == 0
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (found["mode"], found["input_sparsity"]) == ("exact (attention inputs 50%)", 0.5)
    assert found["kl"] > 1e-4


@pytest.fixture(scope="module")
def ruled_bundle(bundle, tmp_path_factory):
    """The same model with thresholds for all of its inputs, by the commands."""
    folder = tmp_path_factory.mktemp("ruled")
    text = folder / "text.txt"
    text.write_text(make_text(50000, seed=2))
    model, ruled, out = (str(path) for path in (bundle.parent / "model", folder / "model", folder / "bundle"))
    teal = ("--method", "teal", "--sparsity", "0.4", "--text", str(text), "--tokens", "1024")
    assert main(["sparsify", "--model", model, *teal, "--out", ruled]) == 0
    assert main(["export", "--model", ruled, "--quant", "f16", "--name", "tiny", "--out", out]) == 0
    return out


def test_a_models_own_rules_are_measured(ruled_bundle, text_file, capsys):
    options = ("--bundle", ruled_bundle, "--text", text_file, "--tokens", 256, "--window", 32, "-t", 1)
    capsys.readouterr()
    assert run(*options, "--mode", "dense,exact", "--reference", "dense", "--json") == 0
    dense, exact = map(json.loads, capsys.readouterr().out.splitlines())
    assert exact["ppl"] == pytest.approx(dense["ppl"], rel=1e-3)
    for site in ("qkv", "o", "gate_up", "down"):  # the first of each 32 tokens keeps all; a ReLU gives zeros
        assert exact["inputs_left_out"][site] > 0.25
    assert run(*options, "--mode", "exact") == 0
    assert re.search(r"; inputs left out: qkv \d+\.\d%, o ", capsys.readouterr().out)


def test_a_bench_tells_what_rules_leave_out(ruled_bundle, text_file, capsys):
    sizes = ("-p", 8, "-n", 4, "-r", 1, "-t", 1, "--quality-tokens", 0)
    arguments = (
        "bench",
        "--bundle",
        ruled_bundle,
        "--text",
        text_file,
        *sizes,
        "--modes",
        "exact",
        "-o",
        "json",
    )
    assert main([str(argument) for argument in arguments]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0.1 < found["inputs_qkv_exact"] < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "exact,llama.cpp", "--input-sparsity", "0.5"), "llama.cpp cannot skip inputs"),
        (("--mode", "exakt"), r"unknown mode \(got exakt, expected dense \| exact"),
        (("--reference", "exakt"), r"unknown mode \(got exakt"),
        (("--text", "nowhere.txt"), "nowhere.txt: no such file"),
        (("--tokens", "-5"), "the number of tokens must be positive"),
        (("--threads", "0"), "--threads: must be at least 1"),
        (("--window", "1"), "--window: a window must hold at least 2 tokens"),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(bundle, text_file, capsys, arguments, message):
    assert run("--bundle", bundle, "--text", text_file, "--tokens", 100, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert re.search(message, err)


def test_folder_that_is_no_bundle(tmp_path, capsys):
    assert run("--bundle", tmp_path) == 2
    assert "hotcold export" in capsys.readouterr().err
