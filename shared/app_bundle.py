"""The Flower bundle of this release: the names of our two apps and not one line of code.

Flower ships a bundle from the coordinator to every site. Ours holds a `pyproject.toml` and the licence's name alone, so
both sides load `server.app` and `client.app` from what is installed there, and its SHA-256 is the same wherever this
release is installed. A site's worker answers messages of this bundle (`client.worker`); any other one is refused.
Not here: the bundle that `flwr build` makes of a checkout, for Flower's own simulation.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from functools import cache

from flwr.cli.build import build_fab_from_files

from shared import __version__

PUBLISHER, NAME = "fedcanvas", "fedcanvas"
LICENCE = "LICENSE"


def bundle_files() -> dict[str, bytes]:
    """What `flwr run FOLDER` bundles, by name."""
    project = f"""\
[project]
name = "{NAME}"
version = "{__version__}"
description = "fedcanvas: the apps are those that are installed"
license = {{ file = "{LICENCE}" }}
dependencies = ["flwr>=1.41.0,<1.42"]

[tool.flwr.app]
publisher = "{PUBLISHER}"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["{LICENCE}"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
"""
    return {"pyproject.toml": project.encode(), LICENCE: b"As of the installed release.\n"}


@cache
def bundle_content() -> bytes:
    """This release's own bundle."""
    return _built(bundle_files())


@cache
def bundle_digest() -> str:
    """Of this release's own bundle."""
    return hashlib.sha256(bundle_content()).hexdigest()


def digest_of_bundle(files: Mapping[str, bytes]) -> str:
    """SHA-256 of the bundle that Flower makes of these files, 64 hex digits."""
    return hashlib.sha256(_built(files)).hexdigest()


def _built(files: Mapping[str, bytes]) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower 1.41 calls a style of patterns by its old name
        content, _ = build_fab_from_files(files)
    return content
