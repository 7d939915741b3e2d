"""Until the disk says that it holds what was written: files, and the names in a folder."""

from __future__ import annotations

import os
from pathlib import Path


def fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """New, renamed and removed names in `path` outlive a power cut only after this."""
    fsync_file(path)
