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


def make_folder(path: Path, *, durable: bool, mode: int = 0o777) -> None:
    """A folder with all above it; with `durable` each new name is on disk before this returns."""
    if path.is_dir():
        return
    make_folder(path.parent, durable=durable, mode=mode)
    path.mkdir(mode=mode, exist_ok=True)
    if durable:
        fsync_folder(path.parent)


def write_whole(path: Path, content: bytes, *, durable: bool = True) -> Path:
    """`path` with `content`, or as it was before: temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        make_folder(path.parent, durable=durable)
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
