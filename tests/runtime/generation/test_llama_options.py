"""llama.cpp's own options beside ours: ignored in one line, or refused by name."""

from __future__ import annotations

import argparse

import pytest

from hotcold import cli
from hotcold.runtime.generation import llama_options


def run(bundle, *options):
    path, fixed = str(bundle.path), ["-n", "4", "--temp", "0", "-t", "1", "--mode", "exact"]
    return cli.main(["run", path, "-p", "fox", *fixed, *options])


def example(names, nargs, value="7"):
    return [names.split()[0], *(["on"] if nargs == "?" else [] if nargs == 0 else [value])]


def test_ignored_options_change_nothing_and_are_said(bundle, capsys):
    assert run(bundle) == 0
    plain = capsys.readouterr()
    table = llama_options._IGNORED + llama_options._IGNORED_IN_RUN
    options = [part for names, nargs, _ in table for part in example(names, nargs)]
    assert run(bundle, *options) == 0
    got = capsys.readouterr()
    assert got.out == plain.out
    said = [line for line in got.err.splitlines() if " is ignored: " in line]
    assert [line.split()[0] for line in said] == [names.split()[0] for names, _, _ in table]


def test_a_command_line_of_llama_cpp(bundle, capsys):
    line = "-ngl 99 --no-mmap -fa -b 512 -ub 128 --mlock --keep -1 -tb 2 -ctk f16 --mirostat 0 --typical 1.0"
    assert run(bundle, *line.split()) == 0
    err = capsys.readouterr().err
    assert "-ngl is ignored: use `run --backend gpu` or `--backend hybrid` for a GPU" in err
    assert "-ctk" not in err and "mirostat" not in err


@pytest.mark.parametrize("entry", llama_options._REFUSED + llama_options._REFUSED_IN_RUN, ids=lambda e: e[0])
def test_options_that_would_change_the_text_are_refused(entry, capsys):
    names, nargs, neutral, _ = entry
    with pytest.raises(SystemExit) as end:
        cli.main(["run", "nowhere", "-p", "fox", *example(names, nargs, "q8_0")])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert f"error: {names.split()[0]} is a llama.cpp option that would change the text: " in err
    if neutral is not None:
        assert cli.main(["run", "nowhere", "-p", "fox", *example(names, nargs, neutral)]) == 2
        assert names.split()[0] not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["perplexity", "bench"])
def test_other_commands_take_those_of_loading(name, capsys):
    assert cli.main([name, "--bundle", "nowhere", "-ngl", "99", "-fa", "on"]) == 2
    assert "-ngl is ignored: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([name, "--bundle", "nowhere", "-ctv", "q4_0"])
    assert "values are kept as f16" in capsys.readouterr().err


def test_no_name_is_there_twice():
    parser = argparse.ArgumentParser()
    llama_options.add_llama_options(parser, generates=True)
    assert parser.parse_args([]) == argparse.Namespace()
