"""The cache of prepared pixels: it answers only for the same bytes and settings, and is whole or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from picture_files import captions_folder, plain_png

from shared.config import DataConfig
from shared.data import ImageCaptionDataset, open_dataset
from shared.data import cache as cache_module
from shared.data.whole_folder import whole_folder
from shared.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
CONFIG = DataConfig(image_size=8)
ROWS = [(f"{i}.png", f"caption {i}") for i in range(5)]


class Opening:
    """Opens a data set and knows whether images were decoded for it."""

    def __init__(self, folder: Path, *, config: DataConfig = CONFIG, cache_dir: Path | None = None) -> None:
        calls: list[tuple[int, int]] = []
        self.dataset: ImageCaptionDataset = open_dataset(
            folder, config=config, cache_dir=cache_dir, progress=lambda done, total: calls.append((done, total))
        )
        self.calls = calls
        self.decoded = bool(calls)


def test_images_are_decoded_once_and_then_mapped(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    first, second = Opening(folder), Opening(folder)
    assert first.calls == [(5, 5)]
    assert not second.decoded
    assert np.array_equal(first.dataset.images, second.dataset.images)
    assert first.dataset.cache_entry is not None
    assert first.dataset.cache_entry.parent == folder / ".fedcanvas-cache"
    assert not second.dataset.images.flags.writeable
    assert isinstance(second.dataset.images.base, np.memmap)
    assert type(second.dataset.images) is np.ndarray


def test_captions_are_read_anew_and_never_stored(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    first = Opening(folder)
    table = folder / "captions.csv"
    table.write_text(table.read_text().replace("caption 3", "another"))
    second = Opening(folder)
    assert not second.decoded
    assert second.dataset.captions[3] == ("another",)
    entry = first.dataset.cache_entry
    assert entry is not None
    assert all(b"caption" not in path.read_bytes() for path in entry.parent.rglob("*") if path.is_file())


def test_a_change_of_bytes_is_seen_even_with_equal_size_and_time(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    Opening(folder)
    state = (folder / "2.png").stat()
    (folder / "2.png").write_bytes(plain_png((200, 0, 7)))
    os.utime(folder / "2.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (folder / "2.png").stat().st_size == state.st_size
    second = Opening(folder)
    assert second.decoded
    assert second.dataset.images[2, 0, 0].tolist() == [200, 0, 7]


def test_settled_files_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    monkeypatch.setattr(cache_module, "SETTLED_NS", -(10**9))  # as if the files had been left alone for long
    Opening(folder)
    monkeypatch.setattr(cache_module, "_content_digest", lambda source: pytest.fail("files were read again"))
    assert not Opening(folder).decoded


def test_files_that_were_just_written_are_not_trusted_by_their_times(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    entry = Opening(folder).dataset.cache_entry
    assert entry is not None
    assert not (entry.parent / "known").exists()


def test_copies_of_the_same_bytes_share_an_entry_and_other_settings_do_not(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one, two = captions_folder(tmp_path / "one", ROWS), captions_folder(tmp_path / "two", ROWS)
    first = Opening(one, cache_dir=cache)
    assert first.decoded
    assert not Opening(two, cache_dir=cache).decoded
    for config in (DataConfig(image_size=28), DataConfig(image_size=8, channels=1)):
        assert Opening(one, config=config, cache_dir=cache).decoded
    assert not Opening(one, cache_dir=cache).decoded
    assert not (one / ".fedcanvas-cache").exists()


def test_another_order_or_another_split_is_another_entry(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    before = Opening(folder).dataset.images.copy()
    lines = (folder / "captions.csv").read_text().splitlines()
    (folder / "captions.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert np.array_equal(Opening(folder).dataset.images, before[::-1])

    arrays = {
        f"{axis}_{split}": np.full((2, 8, 8) if axis == "x" else 2, place, np.uint8)
        for place, split in enumerate(("train", "test"))
        for axis in "xy"
    }
    np.savez(tmp_path / "a.npz", class_names=np.array(["a", "b"]), **arrays)
    for value, split in enumerate(("train", "test")):
        images = open_dataset(tmp_path / "a.npz", config=CONFIG, split=split).images  # type: ignore[arg-type]
        assert (images == value).all()


def test_unusable_images_are_remembered_with_their_reasons(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    (folder / "1.png").write_bytes(b"")
    first, second = Opening(folder), Opening(folder)
    assert not second.decoded
    for opening in (first, second):
        assert opening.dataset.images[:, 0, 0, 0].tolist() == [0, 2, 3, 4]
        assert [row.row for row in opening.dataset.skipped] == [3]
        assert opening.dataset.captions[1] == ("caption 2",)


@pytest.mark.parametrize("damage", ["shorter", "no manifest", "no pixels", "junk manifest", "other shape"])
def test_a_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    first = Opening(folder)
    images, entry = first.dataset.images.copy(), first.dataset.cache_entry
    assert entry is not None
    manifest = entry / "manifest.json"
    if damage == "shorter":
        os.truncate(entry / "pixels.u8", 100)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "no pixels":
        (entry / "pixels.u8").unlink()
    elif damage == "junk manifest":
        manifest.write_text('["x"]')
    else:
        manifest.write_text(json.dumps({"shape": [5, 8, 24, 1], "unusable": {}}))
    second = Opening(folder)
    assert second.decoded
    assert np.array_equal(second.dataset.images, images)


def test_a_read_only_data_folder_works_and_stays_untouched(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    folder.chmod(0o555)
    try:
        opening = Opening(folder)
        assert opening.dataset.cache_entry is None
        assert opening.dataset.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
        assert not opening.dataset.images.flags.writeable
        assert sorted(path.name for path in folder.iterdir()) == sorted([*(name for name, _ in ROWS), "captions.csv"])
        assert Opening(folder, cache_dir=tmp_path / "cache").dataset.cache_entry is not None
    finally:
        folder.chmod(0o755)


def test_a_given_cache_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cache folder .* cannot be written") as caught:
        open_dataset(folder, config=CONFIG, cache_dir=tmp_path / "file/cache")
    assert caught.value.hint


def test_entries_can_be_read_by_their_owner_only(tmp_path: Path) -> None:
    entry = Opening(captions_folder(tmp_path / "set", ROWS)).dataset.cache_entry
    assert entry is not None
    assert entry.stat().st_mode & 0o077 == 0
    assert entry.parent.stat().st_mode & 0o077 == 0


SLOWLY = """
import sys, time
from pathlib import Path
from shared.config import DataConfig
from shared.data import cache, open_dataset
cache.PROGRESS_EVERY = 1
def progress(done, total):
    print(done, flush=True)
    time.sleep(float(sys.argv[2]))
open_dataset(Path(sys.argv[1]), config=DataConfig(image_size=8), progress=progress)
"""


def start(folder: Path, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOWLY, str(folder), str(pause)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_a_maker_that_is_killed_leaves_no_entry_and_the_next_one_succeeds(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    with start(folder, 60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = {path.suffix for path in (folder / ".fedcanvas-cache").iterdir()}
    assert left == {".tmp", ".lock"}
    opening = Opening(folder)
    assert opening.decoded
    assert {path.suffix for path in (folder / ".fedcanvas-cache").iterdir()} == {""}


@pytest.mark.slow
def test_two_processes_decode_a_data_set_once(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", ROWS)
    with start(folder, 0.3) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "1\n"
        began = time.monotonic()
        opening = Opening(folder)
        assert time.monotonic() - began > 0.5  # it waited for the other
        assert not opening.decoded
        assert first.wait() == 0
    assert opening.dataset.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_whole_folder_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_folder(tmp_path / "made") as draft:
            assert draft is not None
            (draft / "half").write_text("x")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert list(tmp_path.iterdir()) == []
