"""Data sets in every layout: what is read, what is skipped and why, and that nothing of it is told."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from picture_files import captions_folder, plain_png

from shared.config import DataConfig
from shared.data import READERS, ImageCaptionDataset, SkippedRow, open_dataset
from shared.data.captions import clean_caption
from shared.data.captions_table import read_rows
from shared.data.source import UnusableRow
from shared.errors import DataError

CONFIG = DataConfig(image_size=8)
SECRET = "patient Rosalind has a rare tumour"


def rows_to_csv(rows: list[dict[str, str]], delimiter: str = ",") -> str:
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    return "\n".join(delimiter.join(f'"{cell}"' for cell in line) for line in lines) + "\n"


FORMS: dict[str, Callable[[list[dict[str, str]]], str]] = {
    "captions.csv": rows_to_csv,
    "captions.tsv": lambda rows: rows_to_csv(rows, "\t"),
    "captions.jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
}


def write_bytes(folder: Path, table: str, data: bytes) -> Path:
    """A folder whose pictures a.png to d.png are red of rising strength, and a captions file as given."""
    folder.mkdir(exist_ok=True)
    for place, name in enumerate("abcd"):
        (folder / f"{name}.png").write_bytes(plain_png((50 * place, 0, 0)))
    (folder / table).write_bytes(data)
    return folder


def write(folder: Path, text: str, table: str = "captions.csv") -> Path:
    return write_bytes(folder, table, text.encode())


@pytest.mark.parametrize("table", FORMS)
def test_every_form_of_captions_file_gives_the_same_data_set(tmp_path: Path, table: str) -> None:
    rows = [
        {"file_name": "a.png", "text": "一只红色的猫, sitting", "organ": "heart", "age": "61"},
        {"file_name": "b.png", "text": "قطة حمراء", "organ": "", "age": "7"},
    ]
    dataset = open_dataset(write(tmp_path / "set", FORMS[table](rows), table), config=CONFIG)
    assert dataset.captions == [("一只红色的猫, sitting",), ("قطة حمراء",)]
    assert dataset.attributes == {"organ": ["heart", ""], "age": ["61", "7"]}
    assert dataset.images.shape == (2, 8, 8, 3)
    assert dataset.images[1, 0, 0].tolist() == [50, 0, 0]
    assert dataset.skipped == []
    assert dataset.name == "set"
    assert len(dataset) == 2


def test_images_are_found_in_the_folder_or_in_its_images_folder(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "set", "file_name,text\na.png,first\ndeep/x.png,second\nimages/y.png,third\ny.png,again\n"
    )
    (folder / "images/deep").mkdir(parents=True)
    (folder / "images/a.png").write_bytes(plain_png((0, 0, 255)))  # the folder itself comes first
    (folder / "images/deep/x.png").write_bytes(plain_png((0, 255, 0)))
    (folder / "images/y.png").write_bytes(plain_png((9, 9, 9)))
    dataset = open_dataset(folder, config=CONFIG)
    assert dataset.images[:, 0, 0].tolist() == [[0, 0, 0], [0, 255, 0], [9, 9, 9]]
    assert dataset.captions == [("first",), ("second",), ("third", "again")]


def test_rows_that_name_one_image_are_one_record_with_all_its_captions(tmp_path: Path) -> None:
    # The privacy unit is an image with all its captions: as two records it would be in one sum twice.
    text = "file_name,text,kind\na.png,a cat,x\nb.png,a dog,y\n./a.png,an animal,z\nlink.png,a pet,w\n"
    folder = write(tmp_path / "set", text)
    (folder / "link.png").symlink_to("a.png")
    dataset = open_dataset(folder, config=CONFIG)
    assert dataset.captions == [("a cat", "an animal", "a pet"), ("a dog",)]
    assert dataset.attributes == {"kind": ["x", "y"]}
    assert len(dataset.images) == 2


def test_damaged_rows_are_named_with_file_line_and_reason_and_the_others_stay(tmp_path: Path) -> None:
    table = b"\n".join([
        b"file_name,text,kind",
        b"a.png,good,k",  # 2
        b"gone.png,text,k",
        b"b.png, \xe2\x80\x8b ,k",  # 4: a blank of no width
        b"c.png,caf\xe9,k",
        b"../outside.png,text,k",  # 6
        b"/etc/hostname,text,k",
        b"c.png,one cell too many,k,k",  # 8
        b"",
        b",no file,k",  # 10
        b"broken.png,text,k",
        b"folder,text,k",  # 12
        b'b.png,"two',
        b'lines, good",k',
        b'c.png,"a quote" in the middle,k',  # 15
        b"d.png,good,k",
        b'd.png,"never closed,k',
        b"",
    ])  # fmt: skip
    folder = write_bytes(tmp_path / "set", "captions.csv", table)
    (tmp_path / "outside.png").write_bytes(plain_png((1, 1, 1)))
    (folder / "broken.png").write_bytes(plain_png((1, 1, 1))[:40])
    (folder / "folder").mkdir()
    dataset = open_dataset(folder, config=CONFIG)
    assert dataset.captions == [("good",), ("two lines, good",), ("good",)]
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 50, 150]
    assert dataset.attributes == {"kind": ["k", "k", "k"]}
    assert dataset.skipped == [
        SkippedRow("gone.png", 3, "there is no such file"),
        SkippedRow("b.png", 4, "the caption is empty"),
        SkippedRow("captions.csv", 5, "it is not valid UTF-8"),
        SkippedRow("../outside.png", 6, "its path leads outside the folder"),
        SkippedRow("/etc/hostname", 7, "its path leads outside the folder"),
        SkippedRow("captions.csv", 8, "it has 4 cells where the header has 3"),
        SkippedRow("captions.csv", 10, "it names no file"),
        SkippedRow("broken.png", 11, "it cannot be decoded as an image"),
        SkippedRow("folder", 12, "it names no regular file"),
        SkippedRow("captions.csv", 15, "its quotes do not close, or a cell is too long"),
        SkippedRow("captions.csv", 17, "its quotes do not close, or a cell is too long"),
    ]
    counts = dataset.skipped_by_reason()
    assert sum(counts.values()) == 11
    assert next(iter(counts.values())) == 2


def test_damaged_lines_of_jsonl_cost_themselves_only(tmp_path: Path) -> None:
    lines = [
        '{"file_name": "a.png", "text": "good", "count": 3, "ill": true, "note": null, "box": [1, 2]}',
        '{"file_name": "b.png", "text": ',
        '["b.png", "text"]',
        '{"file_name": "b.png", "text": 5}',
        '{"file_name": "b.png", "text": "x", "text": "y"}',
        '{"text": "no file"}',
        '{"file_name": "b.png"}',
        '{"file_name": "b.png", "text": "\\ud800"}',
        "[" * 100_000,
        '{"file_name": "b.png", "text": "good \u2028 too", "extra": "only here"}',
    ]
    dataset = open_dataset(write(tmp_path / "set", "\n".join(lines), "captions.jsonl"), config=CONFIG)
    assert dataset.captions == [("good",), ("good too",)]
    assert dataset.attributes == {
        "count": ["3", ""], "ill": ["true", ""], "note": ["", ""], "box": ["[1, 2]", ""], "extra": ["", "only here"],
    }  # fmt: skip
    assert [(row.row, row.reason) for row in dataset.skipped] == [
        (2, "the line is not JSON"),
        (3, "the line is not a JSON object"),
        (4, "its file_name or text is not a string"),
        (5, "it names a key twice"),
        (6, "it names no file"),
        (7, "the caption is empty"),
        (8, "it is not valid UTF-8"),
        (9, "the line is not JSON"),
    ]


def test_a_link_out_of_the_folder_is_not_followed_but_images_may_be_one(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "inside.png").write_bytes(plain_png((1, 2, 3)))
    (tmp_path / "private.png").write_bytes(plain_png((4, 5, 6)))
    folder = write(tmp_path / "set", "file_name,text\ninside.png,good\nlink.png,bad\n")
    (folder / "images").symlink_to(elsewhere)
    (folder / "link.png").symlink_to(tmp_path / "private.png")
    dataset = open_dataset(folder, config=CONFIG)
    assert dataset.images[:, 0, 0].tolist() == [[1, 2, 3]]
    assert dataset.skipped == [SkippedRow("link.png", 3, "its path leads outside the folder")]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "file_name,text\npipe.png,bad\na.png,good\n")
    os.mkfifo(folder / "pipe.png")
    assert open_dataset(folder, config=CONFIG).skipped == [SkippedRow("pipe.png", 2, "it names no regular file")]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no column 'file_name'"),
        (f"a.png,{SECRET}\n", "no column 'file_name'"),
        ("file_name;text\na.png;x\n", "no column 'file_name'"),
        ("file_name,caption\na.png,x\n", "no column 'text'"),
        ("file_name,text,kind,kind\na.png,x,y,z\n", "two columns of one name"),
        ("file_name,text\n", "has no rows"),
        (f"file_name,text\ngone.png,{SECRET}\nb.png,\n", "none of the 2 rows .* row 2: there is no such file"),
        (f'file_name,text\na.png,"{SECRET}', "none of the 1 rows"),
    ],
)
def test_a_captions_file_that_is_wrong_as_a_whole_is_an_error_without_its_content(
    tmp_path: Path, text: str, reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        open_dataset(write(tmp_path / "set", text), config=CONFIG)
    assert caught.value.hint
    assert "Rosalind" not in f"{caught.value.message} {caught.value.hint}"
    assert caught.value.__cause__ is None


def test_a_data_set_of_damaged_images_only_is_an_error_that_counts_reasons(tmp_path: Path) -> None:
    folder = captions_folder(tmp_path / "set", [(f"{i}.png", "x") for i in range(3)])
    for image in folder.glob("*.png"):
        image.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 3 rows .* row 2: the file is empty") as caught:
        open_dataset(folder, config=CONFIG)
    assert "3 x the file is empty" in str(caught.value.hint)


def test_places_without_a_known_layout_are_named_with_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    for path in (tmp_path, tmp_path / "file.txt"):
        with pytest.raises(DataError, match="no captioned images") as caught:
            open_dataset(path, config=CONFIG)
        assert "captions.csv" in str(caught.value.hint)
        assert "x_train" in str(caught.value.hint)
    with pytest.raises(DataError, match="there is no data at"):
        open_dataset(tmp_path / "gone", config=CONFIG)


def test_two_captions_files_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "file_name,text\na.png,x\n")
    write(folder, '{"file_name": "a.png", "text": "x"}', "captions.jsonl")
    with pytest.raises(DataError, match=r"both captions.csv and captions.jsonl"):
        open_dataset(folder, config=CONFIG)


def test_a_file_as_spreadsheets_export_it_is_read_or_told_what_to_do(tmp_path: Path) -> None:
    text = "file_name,text\r\na.png,good\r\n"
    folder = write_bytes(tmp_path / "set", "captions.csv", b"\xef\xbb\xbf" + text.encode())
    assert open_dataset(folder, config=CONFIG).captions == [("good",)]
    write_bytes(folder, "captions.csv", text.encode("utf-16"))
    with pytest.raises(DataError, match="is UTF-16"):
        open_dataset(folder, config=CONFIG)


@given(st.lists(st.text(alphabet='ab",\n\r\té', max_size=12), min_size=1, max_size=6), st.integers(0, 5))
def test_rows_after_a_broken_one_are_still_found(captions: list[str], place: int) -> None:
    # Whatever else stands in cells that were quoted as they should be, wherever a quote was left open between them.
    captions = [f"a{caption}" for caption in captions]
    quoted = [caption.replace('"', '""') for caption in captions]
    rows = [f'r{i}.png,"{caption}"' for i, caption in enumerate(quoted)]
    rows.insert(min(place, len(rows)), 'broken.png,"open')
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "captions.csv"
        table.write_text("file_name,text\n" + "\n".join(rows) + "\n", encoding="utf-8", newline="")
        found = [cells for _, cells in read_rows(table)]
    good = {cells["file_name"]: cells["text"] for cells in found if isinstance(cells, dict)}
    assert {f"r{i}.png": caption for i, caption in enumerate(captions)}.items() <= good.items()
    assert any(isinstance(cells, UnusableRow) for cells in found)


def test_captions_are_cut_at_the_public_maximum_and_their_blanks_collapsed() -> None:
    assert clean_caption("  a\n\tb\u00a0 c ", max_characters=512) == "a b c"
    assert clean_caption("你好世界", max_characters=2) == "你好"
    assert clean_caption("ab cd", max_characters=3) == "ab"
    assert clean_caption("👍", max_characters=9) == "👍"
    for empty in ("", " \n ", "\u200b\u200d", "\0", "\u200b" * 5 + "too late"):
        with pytest.raises(UnusableRow):
            clean_caption(empty, max_characters=5)


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def digits(count: int = 3, shape: tuple[int, ...] = (8, 8)) -> dict[str, np.ndarray]:
    images = np.arange(count, dtype=np.uint8).reshape(-1, *[1] * len(shape)) + np.zeros(shape, np.uint8)
    names = np.array(["zero", "one", "two"])
    return {"x_train": images, "y_train": np.arange(count) % 3, "class_names": names}


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (8, 12)])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_give_captions_by_template_and_the_class_as_an_attribute(
    tmp_path: Path, shape: tuple[int, ...], channels: int
) -> None:
    path = npz(tmp_path / "digits.npz", **digits(shape=shape))
    dataset = open_dataset(path, config=DataConfig(image_size=8, channels=channels))
    assert dataset.captions == [("a photo of a zero",), ("a photo of a one",), ("a photo of a two",)]
    assert dataset.attributes == {"class": ["zero", "one", "two"]}
    assert dataset.images.shape == (3, 8, 8, channels)
    assert [np.unique(image).tolist() for image in dataset.images] == [[0], [1], [2]]
    assert dataset.name == "digits.npz"


def test_the_test_split_of_arrays_is_read_by_name_and_a_folder_has_none(tmp_path: Path) -> None:
    tested = {"x_test": np.full((2, 8, 8), 9, np.uint8), "y_test": np.array([2, 2])}
    path = npz(tmp_path / "digits.npz", **digits(), **tested)
    assert (open_dataset(path, config=CONFIG, split="test").images == 9).all()
    assert len(open_dataset(path, config=CONFIG)) == 3
    folder = captions_folder(tmp_path / "set", [("a.png", "x")])
    with pytest.raises(DataError, match="no 'test' split"):
        open_dataset(folder, config=CONFIG, split="test")


def test_rows_of_arrays_without_a_class_name_are_skipped_by_index(tmp_path: Path) -> None:
    arrays = digits() | {"y_train": np.array([0, 7, -1]), "class_names": np.array(["zero"])}
    dataset = open_dataset(npz(tmp_path / "digits.npz", **arrays), config=CONFIG)
    assert len(dataset) == 1
    reason = "its label has no class name"
    assert dataset.skipped == [SkippedRow("digits.npz", 1, reason), SkippedRow("digits.npz", 2, reason)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x_train": np.zeros((3, 8, 8))}, "x_train is float64"),
        ({"x_train": np.zeros((3, 8), np.uint8)}, r"of shape \(3, 8\)"),
        ({"x_train": np.zeros((4, 8, 8), np.uint8)}, "does not go with 3 labels"),
        ({"y_train": np.zeros((3, 10), int)}, "y_train is not one whole number"),
        ({"y_train": np.zeros(3)}, "y_train is not one whole number"),
        ({"class_names": np.arange(3)}, "class_names is not a list of strings"),
        ({"class_names": np.array(["a", "b", None], dtype=object)}, "'class_names' cannot be read as a plain array"),
        ({"y_train": np.zeros(0, int), "x_train": np.zeros((0, 8, 8), np.uint8)}, "has no rows"),
    ],
)
def test_arrays_of_another_form_are_errors(tmp_path: Path, change: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        open_dataset(npz(tmp_path / "digits.npz", **digits() | change), config=CONFIG)


def test_a_file_that_is_no_npz_or_lacks_an_array_is_an_error(tmp_path: Path) -> None:
    path = npz(tmp_path / "digits.npz", x=np.zeros(3))
    with pytest.raises(DataError, match="no array 'y_train'") as caught:
        open_dataset(path, config=CONFIG)
    assert caught.value.hint == "it holds: x"
    whole = npz(path, **digits(200)).read_bytes()
    for data in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"is no \.npz"):
            open_dataset(path, config=CONFIG)
    path.write_bytes(whole[:60] + b"\xff" * 40 + whole[100:])
    with pytest.raises(DataError):
        open_dataset(path, config=CONFIG)


def test_arrays_may_name_a_subject_for_each_row(tmp_path: Path) -> None:
    for subjects, expected in (
        (np.array(["ann", " ben ", ""]), ["ann", "ben", ""]),
        (np.array([7, 7, 0]), ["7", "7", "0"]),
    ):
        dataset = open_dataset(npz(tmp_path / "digits.npz", **digits(), subject_id=subjects), config=CONFIG)
        assert dataset.attributes == {"class": ["zero", "one", "two"], "subject_id": expected}
        assert dataset.subjects() == expected


def test_a_row_that_is_skipped_does_not_move_the_subjects_of_the_others(tmp_path: Path) -> None:
    arrays = digits() | {"y_train": np.array([0, 7, 2]), "subject_id": np.array(["ann", "ben", "cid"])}
    assert open_dataset(npz(tmp_path / "digits.npz", **arrays), config=CONFIG).subjects() == ["ann", "cid"]


def test_the_test_split_of_arrays_has_no_subjects(tmp_path: Path) -> None:
    tested = {"x_test": np.zeros((2, 8, 8), np.uint8), "y_test": np.array([2, 2]), "subject_id": np.array([1, 2, 3])}
    path = npz(tmp_path / "digits.npz", **digits(), **tested)
    assert open_dataset(path, config=CONFIG, split="test").attributes == {"class": ["two", "two"]}


@pytest.mark.parametrize(
    "subjects", [np.array([1, 2]), np.array([1.0, 2.0, 3.0]), np.array([[1, 2, 3]]), np.array(["a", None, "b"])]
)
def test_subjects_of_another_form_are_an_error(tmp_path: Path, subjects: np.ndarray) -> None:
    with pytest.raises(DataError, match="subject_id"):
        open_dataset(npz(tmp_path / "digits.npz", **digits(), subject_id=subjects), config=CONFIG)


def test_data_that_do_not_say_whose_they_are_have_no_subjects(tmp_path: Path) -> None:
    dataset = open_dataset(npz(tmp_path / "digits.npz", **digits()), config=CONFIG)
    with pytest.raises(DataError, match="has no column 'subject_id'") as caught:
        dataset.subjects()
    assert caught.value.hint


def test_an_image_of_two_subjects_makes_the_data_unusable_and_one_that_a_row_leaves_open_does_not(
    tmp_path: Path,
) -> None:
    start = "file_name,text,subject_id\na.png,one,ann\nb.png,two,\n"
    dataset = open_dataset(write(tmp_path / "set", f"{start}a.png,three,\na.png,four,ann\n"), config=CONFIG)
    assert dataset.captions == [("one", "three", "four"), ("two",)]
    assert dataset.subjects() == ["ann", ""]
    with pytest.raises(DataError, match="rows 2 and 4 give one image to two subjects") as caught:
        open_dataset(write(tmp_path / "set", f"{start}./a.png,three,Rosalind\n"), config=CONFIG)
    assert "Rosalind" not in f"{caught.value.message}{caught.value.hint}"


def test_a_data_set_never_shows_its_content_by_accident(tmp_path: Path) -> None:
    dataset = open_dataset(write(tmp_path / "set", f"file_name,text\na.png,{SECRET}\n"), config=CONFIG)
    assert repr(dataset) == str(dataset) == "ImageCaptionDataset('set', 1 records, 0 rows skipped)"


def test_every_reader_says_what_it_looks_for() -> None:
    assert READERS.names() == ["arrays", "captions-folder"]
    assert all(READERS.get(name).layout for name in READERS.names())


def test_a_data_set_can_be_made_in_memory() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    dataset = ImageCaptionDataset(images=images, captions=[("a",), ("b",)])
    assert len(dataset) == 2
    assert dataset.attributes == {}
