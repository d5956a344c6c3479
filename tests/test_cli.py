"""The command line as a user meets it: help, one-line errors, exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hotcold import cli
from hotcold.errors import InputError

BIN = Path(sys.executable).parent


def installed(*command: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run an installed entry point."""
    return subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, **options)


@pytest.fixture
def fake(monkeypatch):
    """A sub-command `run` that does whatever the test says."""

    def put(function):
        module = SimpleNamespace(
            HELP="does it", EXAMPLE="hotcold run", add_arguments=lambda parser: None, run=function
        )
        monkeypatch.setitem(sys.modules, "hotcold.runtime.command", module)

    return put


def test_help_names_every_command_and_an_example():
    result = installed("hotcold", "--help")
    assert result.returncode == 0 and result.stderr == ""
    for name, (_, text) in cli.COMMANDS.items():
        assert name in result.stdout and text in result.stdout
    assert "example:\n  hotcold demo --out demo\n" in result.stdout


def test_help_lists_the_commands_by_step_of_the_road():
    out = installed("hotcold", "--help").stdout
    titles = [out.index(f"\n{title}:\n") for title in cli.GROUPS]
    assert titles == sorted(titles)
    assert list(cli.GROUPS["start here"]) == ["demo", "run", "bench", "perplexity", "inspect"]
    assert len(cli.COMMANDS) == sum(map(len, cli.GROUPS.values()))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_help_shows_an_example_that_its_own_parser_takes(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    out = capsys.readouterr().out
    example = out.split("example:\n  ")[1].splitlines()[0]
    assert end.value.code == 0 and example.split()[:2] == ["hotcold", name]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_parse(name):
    import argparse
    import importlib
    import shlex

    module = importlib.import_module(cli.COMMANDS[name][0])
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    parser.parse_args(shlex.split(module.EXAMPLE)[2:])


@pytest.mark.parametrize("name", ["collect-traces", "train-predictors"])
def test_the_names_of_their_own(name):
    result = installed(name, "--help")
    assert result.returncode == 0 and result.stdout.startswith(f"usage: {name} ")


@pytest.mark.parametrize("name", ["collect-traces", "train-predictors"])
def test_errors_under_the_names_of_their_own(name):
    result = installed(name)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"{name}: error: ") and result.stderr.count("\n") == 1


def test_version():
    import hotcold

    assert installed("hotcold", "--version").stdout == f"hotcold {hotcold.__version__}\n"


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ["benhc"],
            "hotcold: error: unknown command 'benhc', did you mean 'bench'?; see `hotcold --help`",
        ),
        (["colect-trace"], "did you mean 'collect-traces'?"),
        (["zzz"], "hotcold: error: unknown command 'zzz'; see `hotcold --help`"),
        ([], "the following arguments are required: COMMAND"),
        (["run", "--bundle", "b", "-p", "x", "--foo"], "hotcold run: error: unrecognized arguments: --foo"),
        (["run", "--bundle", "b", "-p", "x", "--top-k", "many"], "--top-k: invalid int value: 'many'"),
    ],
)
def test_wrong_command_lines_are_one_line_and_exit_2(arguments, message):
    result = installed("hotcold", *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_a_hotcold_error(fake, capsys):
    fake(lambda args: (_ for _ in ()).throw(InputError("empty", where="a.txt", fix="write to it")))
    assert cli.main(["run"]) == 2
    assert capsys.readouterr() == ("", "hotcold run: error: a.txt: empty; write to it\n")
    with pytest.raises(InputError):
        cli.main(["run", "--debug"])


def test_an_unexpected_error_is_one_line_too(fake, capsys):
    def run(args):
        raise RuntimeError("two\nlines")

    fake(run)
    assert cli.main(["run"]) == 1
    assert (
        capsys.readouterr().err
        == "hotcold run: unexpected RuntimeError: two lines; use --debug to see where\n"
    )
    with pytest.raises(RuntimeError):
        cli.main(["run", "--debug"])


def test_out_of_memory(fake, capsys):
    fake(lambda args: bytearray(1 << 62))
    assert cli.main(["run"]) == 1
    assert capsys.readouterr().err.startswith("hotcold run: error: out of memory; ")


def test_ctrl_c(fake, capsys):
    def run(args):
        raise KeyboardInterrupt

    fake(run)
    assert cli.main(["run"]) == 130
    assert "interrupted; finished work is kept" in capsys.readouterr().err


def test_the_status_of_a_command_is_that_of_the_process(fake):
    fake(lambda args: 3)
    assert cli.main(["run"]) == 3


CODE = (
    "import sys, types\nfrom hotcold import cli\n"
    "def run(args):\n    print('Größe 谢谢 \\udcff'); print('🐙', file=sys.stderr); return 0\n"
    "sys.modules['hotcold.runtime.command'] = types.SimpleNamespace(\n"
    "    HELP='x → y', EXAMPLE='', add_arguments=lambda p: None, run=run)\n"
    "sys.exit(cli.main(sys.argv[1:]))\n"
)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "prints.py").write_text(CODE, "utf-8")
    return tmp_path / "prints.py"


@pytest.mark.parametrize(
    "encoding,out",
    [("ascii", b"Gr??e ?? ?\n"), ("cp1252", b"Gr\xf6\xdfe ?? ?\n"), ("utf-8", "Größe 谢谢 ?\n".encode())],
)
def test_a_terminal_that_lacks_characters_shows_others(script, encoding, out):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, script, "run"], capture_output=True, env=environment)
    err = "🐙\n".encode() if encoding == "utf-8" else b"\\U0001f419\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)
    done = subprocess.run([sys.executable, script, "run", "--help"], capture_output=True, env=environment)
    assert done.returncode == 0 and not done.stderr


def test_the_c_locale_shows_what_it_can(script):
    plain = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, script, "run"], capture_output=True, env=os.environ | plain)
    assert (done.returncode, done.stdout) == (0, b"Gr??e ?? ?\n")


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    """`hotcold … | head -1`: the pipe breaks, and nobody is told."""
    code = (
        "import sys, types\nfrom hotcold import cli\n"
        "def run(args):\n    for i in range(100_000): print('line', i)\n    return 0\n"
        "sys.modules['hotcold.runtime.command'] = types.SimpleNamespace(\n"
        "    HELP='', EXAMPLE='', add_arguments=lambda p: None, run=run)\n"
        "sys.exit(cli.main(['run']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        first = child.stdout.readline()
        child.stdout.close()
        complaints = child.stderr.read()
    assert (first, complaints, child.returncode) == (b"line 0\n", b"", 141)


def test_options_of_one_letter_are_not_taken_for_longer_ones(capsys):
    """`-o` is not llama.cpp's `-ot`, which is ignored; `--n-pred` still is `--n-predict`."""
    with pytest.raises(SystemExit):
        cli.main(["perplexity", "x", "-o", "json"])
    assert "unrecognized arguments: -o json" in capsys.readouterr().err
    assert cli.main(["run", "/no/such/model", "-p", "a", "--n-pred", "4", "-n5"]) == 2
    assert "no such model" in capsys.readouterr().err
