"""Find the files of a bundle by their role in its manifest."""

from __future__ import annotations

from pathlib import Path

from hotcold.convert.manifest import MANIFEST, Manifest
from hotcold.errors import InputError
from hotcold.identify import identify

__all__ = ["file_of_role"]


def file_of_role(bundle: str | Path, *roles: str) -> Path:
    """The file that has the first of these roles that the bundle has at all.

    Raises InputError where there is no bundle or no such file, FormatError where its manifest is broken.
    """
    if identify(bundle).kind != "bundle":
        fix = "`hotcold export` writes one"
        raise InputError(f"not a bundle: no {MANIFEST}", where=bundle, fix=fix)
    manifest = Manifest.read(bundle)
    names = [name for role in roles for name in manifest.of_role(role)]
    if not names:
        raise InputError(f"the bundle has no {' or '.join(roles)} file", where=bundle)
    path = Path(bundle) / names[0]
    if not path.is_file():
        raise InputError(
            "the manifest names a file that is missing", where=path, fix="export the bundle again"
        )
    return path
