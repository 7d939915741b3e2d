"""The web page's files, read once at the start: nothing else on the disk can be asked for, whatever the path says.

Not here: the page (`page/`), which is there where somebody put it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("page")
MOST_BYTES = 2**24
_KINDS = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".json": "application/json", ".svg": "image/svg+xml", ".png": "image/png", ".ico": "image/x-icon",
    ".webmanifest": "application/manifest+json", ".woff2": "font/woff2",
}  # fmt: skip


@dataclass(frozen=True)
class PageFile:
    content: bytes
    kind: str


def read_page(folder: Path = FOLDER) -> dict[str, PageFile]:
    """Files by their path below `folder`, with `/`; those of kinds that a page is made of."""
    found: dict[str, PageFile] = {}
    size = 0
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.suffix in _KINDS and path.is_file():
            content = path.read_bytes()
            size += len(content)
            assert size <= MOST_BYTES, "the page of a release is small"
            found[path.relative_to(folder).as_posix()] = PageFile(content, _KINDS[path.suffix])
    return found
