"""README.md, constraints.txt and pyproject.toml say what is so."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from hotcold.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS_PAGE = (ROOT / "docs/commands.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = ("predictor", "runtime", "convert", "eval", "sparsify", "src")
# Import names that differ from those of their distributions.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "llama_cpp": "llama-cpp-python", "yaml": "pyyaml"}
# Asked for by name, in an error that says how to install it.
ON_DEMAND = {"datasets"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def marked(marker: str) -> str:
    """The one command in the code block after a marker."""
    blocks = re.findall(rf"<!-- {marker} -->\n```bash\n(.*)\n```\n", README)
    assert len(blocks) == 1, f"{len(blocks)} of {marker}"
    return blocks[0]


def declared() -> set[str]:
    """Distributions named in pyproject.toml, extras included."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {canonical(re.match(r"[\w.-]+", line).group()) for each in lists for line in each}


def test_the_two_commands():
    assert marked("demo-command") == "pip install -c constraints.txt '.[demo]' && hotcold demo --out demo"
    tests = "pip install -c constraints.txt '.[test]' && pytest -n 2 --dist worksteal"
    assert marked("test-command") == tests
    assert {"demo", "test"} <= set(PROJECT["optional-dependencies"])


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci/run").read_text()
    assert "<!-- test-command -->" in script and 'bash -euo pipefail -c "$command"' in script


def documented_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README + COMMANDS_PAGE, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("hotcold ")]


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands_parse(command):
    _, name, *arguments = shlex.split(command, comments=True)
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    parser.parse_args(arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_docs_describe_every_command(name):
    assert f"**`{name}`**" in README and f"- **`{name}`**" in COMMANDS_PAGE


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_links_lead_somewhere():
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            assert "://" in target or (document.parent / target).exists(), f"{document.name}: {target}"


def test_constraints_pin_every_direct_dependency():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonical(name)] = version
    assert declared() - {"hotcold", "triton"} <= set(pins)  # triton's version is torch's choice
    assert pins["torch"] == "2.13.0"


def third_party_imports() -> dict[str, str]:
    """Distribution of each imported module that is neither ours nor Python's, and one place of it."""
    found = {}
    for path in [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"hotcold"}:
                found[canonical(DISTRIBUTIONS.get(name, name))] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_imported_package_is_declared():
    missing = {name: place for name, place in third_party_imports().items() if name not in declared()}
    assert set(missing) <= ON_DEMAND, missing
