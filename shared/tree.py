"""Do the running modules come from one release, in one folder?

Flower loads `client.app` and `server.app` by bare name, and Ray's workers look for them where their
process happened to start: another checkout on the path answers in our place without any error. Both apps
call `check_same_tree(__file__)` when they are imported, before they answer anything.
Not covered: a file edited inside the folder, and code that never calls the check.
"""

from __future__ import annotations

import hashlib
import sys
import tomllib
from pathlib import Path

from shared import __version__
from shared.errors import FederationError

PACKAGES = ("shared", "client", "server", "simulations")


def check_same_tree(file: str) -> Path:
    """The release's folder, once everything of ours that is loaded lies in it.

    Args:
        file: `__file__` of the calling module, one folder below the release's.
    Raises:
        FederationError: two folders, a package without files, or another version than the folder's.
    """
    root = Path(file).resolve().parents[1]
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] not in PACKAGES:
            continue
        place = getattr(module, "__file__", None)
        if place is None or not Path(place).resolve().is_relative_to(root / name.partition(".")[0]):
            raise _mixed(f"module '{name}' comes from {place or 'a folder without __init__.py'}, not from {root}")
    project = root / "pyproject.toml"  # a checkout or a bundle has one, an installed wheel does not
    if project.is_file():
        version = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("version", __version__)
        if version != __version__:
            raise _mixed(f"{project} is of version {version}, the code of {__version__}")
    return root


def code_digest(root: Path) -> str:
    """SHA-256 over what a site runs: names and contents of all Python files of `client` and `shared`."""
    digest = hashlib.sha256()
    for path in sorted(path for package in ("client", "shared") for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _mixed(fact: str) -> FederationError:
    return FederationError(
        f"code of two releases is mixed: {fact}",
        hint="start from a folder without another 'client' or 'shared', and leave PYTHONPATH unset",
    )
