"""The kit that a federation hands to a site: one zip file, nothing in it secret.

    federation.json        statement `federation`
    aggregator-keys.json   statement `aggregator-keys`
    site.json              {"site": the name that the federation expects the site under}
    README.txt             what to do with it, and the fingerprint, which must come another way as well

Whoever holds a kit can do nothing with it but ask to be admitted. A reader takes these four names alone, within limits,
and unpacks nothing to a disk.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from shared.disk import write_whole
from shared.errors import TrustError
from shared.protection.federation import SITE_NAME, AggregatorKeys, Federation

NAMES = ("federation.json", "aggregator-keys.json", "site.json", "README.txt")
MOST_BYTES = 2**20  # of the file, and of each part
DATE = (1980, 1, 1, 0, 0, 0)  # equal kits are equal files

README = """\
Joining the federation {name} as {site}
{line}

1. Ask the operator, by telephone or another way that this file did not come by, for the fingerprint of the federation:

       {fingerprint}

   If it is another one, stop: this kit is not the federation's.
2. Install fedcanvas, then:

       fedcanvas client join KIT.zip SITE_DIR --data DATA --lineage NAME --max-epsilon 8 --delta 1e-6

   It makes the site's own keys, which never leave it, and writes SITE_DIR/request.json.
3. Send request.json to the operator, and read out the fingerprint that it shows. Nothing in it is secret.
"""


@dataclass(frozen=True)
class Kit:
    """What a site needs to ask to be admitted."""

    federation: Federation
    federation_statement: bytes
    keys_statement: bytes
    site: str


def write_kit(path: Path, *, federation: bytes, keys: bytes, site: str) -> Kit:
    """Raises `TrustError` when the statements do not fit each other."""
    known = Federation.read(federation, what="the federation's statement")
    AggregatorKeys.read(keys, known)
    title = f"Joining the federation {known.name} as {site}"
    readme = README.format(name=known.name, site=site, line="=" * len(title), fingerprint=known.fingerprint)
    parts = (federation, keys, json.dumps({"site": site}).encode() + b"\n", readme.encode())
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in zip(NAMES, parts, strict=True):
            archive.writestr(zipfile.ZipInfo(name, DATE), part)
    write_whole(path, content.getvalue())
    return Kit(known, federation, keys, site)


def read_kit(path: Path) -> Kit:
    """Raises `TrustError` when it is no kit, or its keys are not in force; whose kit it is, its fingerprint says."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise TrustError(f"the kit {path} cannot be read: {error.strerror or error}") from None
    if len(content) > MOST_BYTES:
        raise TrustError(f"{path} is larger than any kit")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = sorted(entry.filename for entry in archive.infolist())
            if names != sorted(NAMES):
                raise TrustError(f"{path} is no kit: it does not hold exactly {', '.join(NAMES)}")
            parts = {name: _part(archive, name) for name in NAMES}
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        raise TrustError(f"{path} is no kit: it is damaged, or no zip file") from None
    federation = Federation.read(parts["federation.json"], what=f"federation.json in {path}")
    AggregatorKeys.read(parts["aggregator-keys.json"], federation)
    return Kit(federation, parts["federation.json"], parts["aggregator-keys.json"], _site(parts["site.json"], path))


def _part(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as file:
        content = file.read(MOST_BYTES + 1)  # whatever its header says of the size
    if len(content) > MOST_BYTES:
        raise TrustError(f"{name} in the kit is too long")
    return content


def _site(content: bytes, path: Path) -> str:
    try:
        site = json.loads(content)["site"]
    except (ValueError, KeyError, TypeError):
        site = None
    if not isinstance(site, str) or not SITE_NAME.fullmatch(site):
        raise TrustError(f"site.json in {path} names no site")
    return site
