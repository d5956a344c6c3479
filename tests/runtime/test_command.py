"""`hotcold run` from its arguments to stdout, stderr and exit status, on a tiny bundle."""

from __future__ import annotations

import re

import pytest

from hotcold import cli
from hotcold.runtime import command
from hotcold.runtime.cpu.engine import CpuEngine as Engine


def hotcold_run(bundle, *arguments, mode="predicted"):
    return cli.main(["run", "--bundle", str(bundle.path), "-t", "1", "--mode", mode, *arguments])


def test_text_to_stdout_and_figures_to_stderr(bundle, capsys):
    assert hotcold_run(bundle, "-p", "The quick", "-n", "8", "--temp", "0", "--ignore-eos") == 0
    out, err = capsys.readouterr()
    assert out.startswith("The quick") and out.endswith("\n") and len(out) > len("The quick\n")
    lines = err.splitlines()
    assert re.fullmatch(r"prompt:     \d+ tokens, [\d.]+ tokens/s", lines[0])
    assert re.fullmatch(r"generation: 8 tokens, [\d.]+ tokens/s", lines[1])
    assert re.fullmatch(r"neurons:    [\d.]+% fired, [\d.]+% predicted \(predicted mode, -t 1\)", lines[2])
    assert len(lines) == 3


def test_no_display_prompt_prints_the_rest_alone(bundle, capsys):
    options = ["-p", "The quick", "-n", "8", "--temp", "0", "--ignore-eos"]
    hotcold_run(bundle, *options)
    whole = capsys.readouterr().out
    hotcold_run(bundle, *options, "--no-display-prompt")
    assert "The quick" + capsys.readouterr().out == whole


def test_same_seed_same_text(bundle, capsys):
    texts = []
    for seed in "5", "5", "6":
        hotcold_run(bundle, "-p", "fox", "-n", "20", "-s", seed, "--ignore-eos", "--temp", "2")
        out, err = capsys.readouterr()
        assert f"seed {seed}" in err
        texts.append(out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "mode,neurons", [("exact", r"[\d.]+% fired"), ("dense", r"[\d.]+% fired"), ("predicted", ".* predicted")]
)
def test_modes(bundle, capsys, mode, neurons):
    assert hotcold_run(bundle, "-p", "fox", "-n", "3", mode=mode) == 0
    assert re.search(rf"^neurons:    {neurons} \({mode} mode, -t 1\)$", capsys.readouterr().err, re.MULTILINE)


def test_inputs_left_out_change_what_is_said(bundle, capsys):
    texts = []
    for share in "0", "0.9":
        options = ["-p", "The quick", "-n", "20", "--temp", "0", "--ignore-eos", "--input-sparsity", share]
        assert hotcold_run(bundle, *options) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


def test_auto_mode_is_measured_once(bundle, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for when in ("now", "earlier"):
        assert hotcold_run(bundle, "-p", "fox", "-n", "3", mode="auto") == 0
        err = capsys.readouterr().err
        (mode,) = re.findall(
            rf"^auto mode: (\w+), the fastest \(.*, measured {when} on this machine\)$", err, re.M
        )
        assert f"({mode} mode, " in err


def test_prompt_from_a_file_without_its_last_newline(bundle, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("brown\nfox\n")
    assert hotcold_run(bundle, "-f", str(tmp_path / "prompt.txt"), "-n", "0") == 0
    assert capsys.readouterr().out == "brown\nfox\n"


def test_chat_prints_the_answer_alone(bundle, capsys):
    assert hotcold_run(bundle, "-p", "hello", "--chat", "-n", "4", "--ignore-eos", "-s", "1") == 0
    out, err = capsys.readouterr()
    assert "hello" not in out
    n_template = len(
        bundle.tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n").ids
    )
    assert f"prompt:     {n_template} tokens" in err


def test_a_full_context_is_said_in_one_line(bundle, capsys):
    assert hotcold_run(bundle, "-p", "fox", "-c", "16", "--ignore-eos", "--temp", "0") == 0
    assert (
        "stopped: the context of 16 tokens is full; raise it with -c" in capsys.readouterr().err.splitlines()
    )


def test_stops_at_the_end_of_text(make_bundle, capsys, monkeypatch):
    """The token that greedy decoding gives third becomes <|im_end|>: the text must stop before it."""
    bundle = make_bundle(seed=3)
    hotcold_run(bundle, "-p", "fox", "-n", "3", "--temp", "0", "--ignore-eos", mode="exact")
    whole = capsys.readouterr()
    engine = Engine.load(bundle.path, "exact", n_threads=1)
    ids = bundle.tokenizer.encode("fox").ids
    logits = engine.prefill(ids)
    for _ in range(2):
        logits = engine.decode(int(logits.argmax()))
    from hotcold.runtime.generation.vocabulary import Vocabulary

    loaded = Vocabulary.load(bundle.path)
    stops_early = Vocabulary(loaded.tokenizer, frozenset({int(logits.argmax())}), "", "", None)
    monkeypatch.setattr(Vocabulary, "load", lambda _: stops_early)
    assert hotcold_run(bundle, "-p", "fox", "--temp", "0", mode="exact") == 0
    stopped = capsys.readouterr()
    assert whole.out.startswith(stopped.out.removesuffix("\n")) and "generation: 2 tokens" in stopped.err


def test_ctrl_c_shows_the_figures_and_exits_with_130(bundle, capsys, monkeypatch):
    decode, calls = Engine.decode, []

    def interrupted(self, token):
        calls.append(token)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, token)

    monkeypatch.setattr(Engine, "decode", interrupted)
    assert hotcold_run(bundle, "-p", "fox", "--ignore-eos") == 130
    out, err = capsys.readouterr()
    assert out.startswith("fox") and out.endswith("\n")
    assert "generation: 3 tokens" in err and "fired" in err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "fox", "-n", "-3"], "-n out of range (got -3, expected -2 or more)"),
        (["-p", "fox", "-c", "-1"], "-c out of range (got -1, expected 0 to 2147483647)"),
        (["-p", "fox", "-c", "2147483648"], "-c out of range (got 2147483648, expected 0 to 2147483647)"),
        (["-p", r"a\xff"], "-p: the prompt is not UTF-8 at byte 1"),
        (["-p", r"a\x00"], "-p: the prompt has a NUL at character 1"),
        (["-p", "a\udcff"], "-p: the prompt is not UTF-8 at byte 1"),
        (["-p", "fox", "--top-p", "2"], "--top-p out of range (got 2.0, expected above 0, at most 1 (off))"),
        (
            ["-p", "fox", "--input-sparsity", "50"],
            "no such share of inputs (got 50.0, expected 0 to 1, less than 1)",
        ),
        (["-p", "fox", "--temp", "nan"], "--temp out of range (got nan, expected 0 (greedy) or more)"),
        (
            ["-f", "/nonexistent/prompt"],
            "/nonexistent/prompt: cannot read the prompt: No such file or directory",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_2(bundle, capsys, arguments, message):
    assert hotcold_run(bundle, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"hotcold run: error: {message}\n"


@pytest.mark.parametrize("n", ["-1", "-2"])
def test_no_limit_is_the_end_of_the_context(bundle, capsys, n):
    """And `-c 0` is the context that the model was trained on."""
    context = bundle.model.config.max_position_embeddings
    options = ["-p", "fox", "-n", n, "-c", "0", "--ignore-eos", "--temp", "-1", "--top-k", "-1"]
    assert hotcold_run(bundle, *options) == 0
    assert f"stopped: the context of {context} tokens is full" in capsys.readouterr().err


def test_threads_below_one_are_the_engines_choice(bundle, capsys):
    for n in "0", "-1":
        assert hotcold_run(bundle, "-p", "fox", "-n", "1", "-t", n) == 0
        assert re.search(r"-t [1-9]\d*\)$", capsys.readouterr().err.splitlines()[-1])


def test_the_largest_seed_of_llama_cpp_is_a_new_one(bundle, capsys):
    assert hotcold_run(bundle, "-p", "fox", "-n", "1", "-s", str(2**32 - 1)) == 0
    assert f"seed {2**32 - 1}" not in capsys.readouterr().err


def test_escapes_in_the_prompt(bundle, capsys):
    for option, expected in (["-e"], "a\nb\n"), (["--no-escape"], "a\\nb\n"), ([], "a\nb\n"):
        assert hotcold_run(bundle, "-p", r"a\nb", "-n", "0", *option) == 0
        assert capsys.readouterr().out == expected


def test_a_file_keeps_its_backslashes_and_loses_its_byte_order_mark(bundle, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfbrown\\nfox\r\n")
    assert hotcold_run(bundle, "-f", str(tmp_path / "prompt.txt"), "-n", "0") == 0
    assert capsys.readouterr().out == "brown\\nfox\r\n"


def test_a_file_with_a_nul(bundle, capsys, tmp_path):
    (tmp_path / "nul").write_bytes(b"a\0b")
    assert hotcold_run(bundle, "-f", str(tmp_path / "nul")) == 2
    assert capsys.readouterr().err.endswith("nul: the prompt has a NUL at character 1\n")


def test_a_file_that_is_not_utf8(bundle, capsys, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    assert hotcold_run(bundle, "-f", str(tmp_path / "latin1.txt")) == 2
    assert "latin1.txt: the prompt is not UTF-8 at byte 2" in capsys.readouterr().err


def test_defaults_are_those_of_the_sampler():
    import argparse

    from hotcold.runtime.generation.sampling import SamplingParams

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--bundle", "b", "-p", "x"])
    assert command._sampling_params(args) == SamplingParams()
