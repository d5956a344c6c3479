"""Find the files of a bundle by their role in its manifest.json."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from hotcold.errors import FormatError, InputError

__all__ = ["file_of_role", "read_manifest"]

FORMAT, VERSION = "hotcold-bundle", 1


def read_manifest(bundle: str | Path) -> dict[str, Any]:
    """The manifest of a bundle folder, its format, version and file list checked.

    Raises InputError where there is no bundle, FormatError where the manifest is not one.
    """
    path = Path(bundle) / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        fix = "`hotcold export` writes one"
        raise InputError("not a bundle: no manifest.json", where=bundle, fix=fix) from None
    except ValueError as error:
        raise FormatError(f"not JSON: {error}", where=path) from error
    kind = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
    if kind != FORMAT:
        raise FormatError("not a bundle's manifest", where=path, field="format", got=kind, expected=FORMAT)
    if manifest.get("version") != VERSION:
        got, fix = manifest.get("version"), "export the bundle again with this hotcold"
        raise FormatError("unknown version", where=path, field="version", got=got, expected=VERSION, fix=fix)
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise FormatError("no list of files", where=path, field="files", expected='{name: {"role": …}, …}')
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise FormatError("a file outside of the bundle", where=path, field="files", got=name)
    return manifest


def file_of_role(bundle: str | Path, role: str) -> Path:
    """The first file with this role; InputError if the bundle has none or it is missing."""
    names = [name for name, entry in read_manifest(bundle)["files"].items() if entry.get("role") == role]
    if not names:
        raise InputError(f"the bundle has no {role} file", where=bundle)
    path = Path(bundle) / names[0]
    if not path.is_file():
        raise InputError(
            "the manifest names a file that is missing", where=path, fix="export the bundle again"
        )
    return path
