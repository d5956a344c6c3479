"""typings/ shows type checkers and editors the package as it is installed."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINKS = ROOT / "typings" / "hotcold"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
FOLDERS = {
    package.removeprefix("hotcold/"): ROOT / folder
    for package, folder in PROJECT["scikit-build"]["wheel"]["packages"].items()
    if package != "hotcold"
}


def test_there_is_a_link_for_each_mapped_folder_and_no_other():
    assert {link.name: link.resolve() for link in LINKS.iterdir()} == FOLDERS


def test_links_are_relative_so_that_they_hold_in_every_checkout():
    assert all(link.is_symlink() and not link.readlink().is_absolute() for link in LINKS.iterdir())


def test_the_checker_reads_every_folder_through_its_link():
    """Read from two places, a class would be two."""
    links = {f"typings/hotcold/{name}" for name in FOLDERS}
    assert set(PROJECT["basedpyright"]["include"]) == {"src"} | links
