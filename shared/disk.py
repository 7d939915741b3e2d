"""Files that appear whole, and until the disk says that it holds them: contents, and the names in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from shared.errors import RunDirectoryError


def fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """New, renamed and removed names in `path` outlive a power cut only after this."""
    fsync_file(path)


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> Path:
    """`path` with `content`, or as it was before: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(path)
        if durable:
            fsync_folder(path.parent)
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written: {error.strerror or error}") from None
    return path
