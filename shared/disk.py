"""Files and folders that appear whole, waiting until the disk holds contents and names, and locks of a folder."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shared.errors import FedCanvasError, RunDirectoryError


def take_lock(path: Path, busy: FedCanvasError) -> int:
    """An open descriptor that holds the lock file `path` until it is closed; `busy` is raised where another has it.

    The kernel frees it when the process ends, however it ends. The file stays: removing it would let two in.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise busy from None
        raise
    return descriptor


@contextmanager
def locked(path: Path, busy: FedCanvasError) -> Iterator[None]:
    """Holds the lock file `path` for the time of the block; nobody waits for it."""
    descriptor = take_lock(path, busy)
    try:
        yield
    finally:
        os.close(descriptor)


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


def make_private(folder: Path, *names: str) -> None:
    """Folders in `folder` that nobody else can enter, in this order; one that is there is closed to others."""
    for name in names:
        (folder / name).mkdir(mode=0o700, exist_ok=True)
        (folder / name).chmod(0o700)  # a release before left it open


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


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """The new folder `out` with `files`, by names below it: whole, or not there.

    Raises:
        RunDirectoryError: something is at `out` already, or it cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise RunDirectoryError(f"{out} is there already", hint="name a new folder: nothing is written over")
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        make_folder(partial, durable=True)
        for name, content in files.items():
            write_whole(partial / name, content)
        partial.rename(out)
        fsync_folder(out.parent)
    except (OSError, RunDirectoryError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.message if isinstance(error, RunDirectoryError) else error.strerror or error
        raise RunDirectoryError(f"{out} cannot be written: {reason}") from None
