"""Prepared pixels on disk, memory-mapped: decoded once, then opened at once.

An entry is keyed by the bytes of the source files, the fingerprint of the preprocessing, and the versions of this
format and of OpenCV. It is a folder of two files that appears whole:

    <key>/pixels.u8        M x size x size x channels bytes, pictures one after another
    <key>/manifest.json    {"shape": [M, size, size, channels], "unusable": {"place": "reason"}}
    known/<signature>      the content digest of files whose names, sizes and times are `signature`

Reading every byte again at each start would cost a fresh process seconds on large data, so the digest of files that
have not changed (size, modification and change time, as git does) is remembered. Files younger than two seconds
are never remembered: they could change again without a new time.
Pixels are as private as the images: entries can be read by their owner only, and hold no captions. Old entries
stay until someone deletes them, which is safe at any time.
Not covered: damage to an entry that keeps its length.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import cv2
import numpy as np

from shared.config import DataConfig
from shared.data.decoding import quiet_codecs
from shared.data.preprocessing import pipeline_fingerprint, to_square
from shared.data.source import Source, UnusableRow
from shared.data.whole_folder import whole_folder
from shared.errors import DataError

FORMAT_VERSION = 1
FOLDER = ".fedcanvas-cache"
PIXELS, MANIFEST, KNOWN = "pixels.u8", "manifest.json", "known"
SETTLED_NS = 2 * 10**9
PROGRESS_EVERY = 100

Progress = Callable[[int, int], None]


class Pixels(NamedTuple):
    """`images` `(M, size, size, channels)` uint8, read-only, of the records that are not in `unusable`, in order.

    Attributes:
        unusable: place of a record to the reason.
        entry: the cache folder that is mapped; `None` when the images are in memory only.
    """

    images: np.ndarray
    unusable: dict[int, str]
    entry: Path | None


def prepared_pixels(
    source: Source, *, config: DataConfig, cache_dir: Path | None = None, progress: Progress | None = None
) -> Pixels:
    """The pixels of all records of `source`, from the cache or made now.

    Without `cache_dir` the cache lies in `source.home`; where that cannot be written, the images stay in memory.

    Raises:
        DataError: `cache_dir` was given and cannot be written.
    """
    folder = cache_dir or source.home / FOLDER
    if cache_dir is None and not folder.exists() and not _declared_writable(source.home):
        return _in_memory(source, config, progress)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        entry = folder / _entry_key(source, config, folder)
        return _open_entry(entry, config) or _make_entry(entry, source, config, progress)
    except OSError as error:
        if cache_dir is None:
            return _in_memory(source, config, progress)
        raise DataError(
            f"the cache folder {cache_dir} cannot be written: {error.strerror}",
            hint="name another folder, or free some space there",
        ) from None


def _make_entry(entry: Path, source: Source, config: DataConfig, progress: Progress | None) -> Pixels:
    with whole_folder(entry, is_whole=lambda folder: _open_entry(folder, config) is not None) as draft:
        if draft is not None:
            draft.chmod(0o700)
            with open(draft / PIXELS, "wb") as file:
                count, unusable = _write_pixels(file, source, config, progress)
                _flush(file)
            with open(draft / MANIFEST, "w", encoding="utf-8") as text:
                json.dump({"shape": [count, *_shape(config)], "unusable": unusable}, text)
                _flush(text)
    made = _open_entry(entry, config)
    if made is None:
        raise OSError(0, "a new entry cannot be read back")
    return made


def _in_memory(source: Source, config: DataConfig, progress: Progress | None) -> Pixels:
    buffer = io.BytesIO()
    count, unusable = _write_pixels(buffer, source, config, progress)
    images = np.frombuffer(buffer.getvalue(), dtype=np.uint8).reshape(count, *_shape(config))
    return Pixels(images, unusable, None)


def _write_pixels(
    file: BinaryIO, source: Source, config: DataConfig, progress: Progress | None
) -> tuple[int, dict[int, str]]:
    """Writes picture after picture; the number written, and why the others were not."""
    count, total = 0, len(source.records)
    unusable: dict[int, str] = {}
    with quiet_codecs():
        for place in range(total):
            try:
                image = source.load(place)
                file.write(to_square(image, image_size=config.image_size, channels=config.channels).tobytes())
                count += 1
            except UnusableRow as reason:
                unusable[place] = str(reason)
            if progress is not None and ((place + 1) % PROGRESS_EVERY == 0 or place + 1 == total):
                progress(place + 1, total)
    return count, unusable


def _open_entry(entry: Path, config: DataConfig) -> Pixels | None:
    """The entry, or `None` when there is none that is whole."""
    try:
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        shape = tuple(manifest["shape"])
        unusable = {int(place): str(reason) for place, reason in manifest["unusable"].items()}
        if shape[1:] != _shape(config) or (entry / PIXELS).stat().st_size != int(np.prod(shape)):
            return None
        if shape[0] == 0:  # an empty file cannot be mapped
            return Pixels(np.zeros(shape, np.uint8), unusable, entry)
        # A plain array on the map: the memmap class would follow every slice and copy around.
        images = np.asarray(np.memmap(entry / PIXELS, dtype=np.uint8, mode="r", shape=shape))
        return Pixels(images, unusable, entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _shape(config: DataConfig) -> tuple[int, int, int]:
    return config.image_size, config.image_size, config.channels


def _declared_writable(folder: Path) -> bool:
    """Whether the folder has a write bit at all: a read-only folder stays untouched, by an administrator too."""
    return bool(folder.stat().st_mode & 0o222)


def _entry_key(source: Source, config: DataConfig, folder: Path) -> str:
    parts = [FORMAT_VERSION, cv2.__version__, pipeline_fingerprint(config), _content_of(source, folder)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _content_of(source: Source, folder: Path) -> str:
    """The content digest, remembered in `folder` once the files are settled."""
    signature, settled = _signature(source)
    known = folder / KNOWN / signature
    try:
        return known.read_text(encoding="ascii")
    except (OSError, ValueError):
        content = _content_digest(source)
    if settled:
        draft = known.with_name(f"{signature}.{os.getpid()}.{threading.get_ident()}.tmp")
        with suppress(OSError):  # a cache that may only be read still serves
            known.parent.mkdir(mode=0o700, exist_ok=True)
            draft.write_text(content, encoding="ascii")
            draft.replace(known)
    return content


def _content_digest(source: Source) -> str:
    """SHA-256 over the bytes of all files, each with its length, in the order of the records."""
    digest = hashlib.sha256(f"{source.part}\n".encode())
    for path in source.files:
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                while block := file.read(2**20):
                    digest.update(block)
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def _signature(source: Source) -> tuple[str, bool]:
    """SHA-256 over path, size and times of all files, and whether the last change is long enough ago to trust it."""
    digest = hashlib.sha256(f"{source.part}\n".encode())
    newest = 0
    for path in source.files:
        try:
            state = os.stat(path)
        except OSError:
            digest.update(f"{path}\0gone\n".encode())
            continue
        digest.update(f"{path}\0{state.st_size}\0{state.st_mtime_ns}\0{state.st_ctime_ns}\n".encode())
        newest = max(newest, state.st_mtime_ns, state.st_ctime_ns)
    return digest.hexdigest(), newest < time.time_ns() - SETTLED_NS


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
