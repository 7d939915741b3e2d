"""A folder that appears whole or not at all, however many processes make it and whenever they are killed.

Not covered: a power cut right after the rename, unless the maker flushed its files to disk itself.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.disk import fsync_folder


@contextmanager
def whole_folder(target: Path, *, is_whole: Callable[[Path], bool] = Path.exists) -> Iterator[Path | None]:
    """Yields an empty folder to fill, which becomes `target` at the end; `None` when `target` is there already.

    One maker at a time: others wait here and then find `target`. When the body raises, nothing appears.
    A `target` that is there but not `is_whole` (damaged from outside) is removed first.

    Raises:
        OSError: the folder around `target` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock_path = target.with_name(f".{target.name}.lock")
    draft = target.with_name(f".{target.name}.tmp")
    lock = _acquire(lock_path)
    try:
        if is_whole(target):
            yield None
            return
        if target.exists():
            shutil.rmtree(target)
        shutil.rmtree(draft, ignore_errors=True)  # of a maker that was killed
        draft.mkdir()
        try:
            yield draft
            draft.rename(target)
            fsync_folder(target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    finally:
        lock_path.unlink(missing_ok=True)
        os.close(lock)


def _acquire(path: Path) -> int:
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # The one who held it may have removed the file meanwhile: a lock on a removed file guards nothing.
            if path.exists() and os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
