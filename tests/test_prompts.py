"""Public prompts: what a file may hold, and how a wrong one is answered."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from shared import records
from shared.errors import DataError, PromptError
from shared.prompts import MAX_CHARACTERS_TOGETHER, MAX_PROMPT_CHARACTERS, MAX_PROMPTS, PromptPool, clean_prompt


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_file_gives_its_prompts_in_order_each_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "\ufeff# public\n\n  a red cat \r\nأحمر\n红色圆形\n   # also left out\na red cat\nrot # kein Kommentar\n",
    )
    pool = PromptPool.from_file(path)
    assert pool.texts == ("a red cat", "أحمر", "红色圆形", "rot # kein Kommentar")
    assert len(pool) == 4


def test_the_digest_is_that_of_the_prompts_one_a_line(tmp_path: Path) -> None:
    content = "a cat\nein Hund\n"
    assert PromptPool.from_file(write(tmp_path, content)).digest == hashlib.sha256(content.encode()).hexdigest()
    assert PromptPool(("a cat", "ein Hund")).digest != PromptPool(("ein Hund", "a cat")).digest


@pytest.mark.parametrize("content", ["", "\n \n", "# only a remark\n"])
def test_a_file_without_prompts_is_refused_with_what_a_file_looks_like(tmp_path: Path, content: str) -> None:
    with pytest.raises(PromptError, match="holds no prompt") as error:
        PromptPool.from_file(write(tmp_path, content))
    assert "one public prompt a line; never made from captions" in str(error.value.hint)


def test_a_long_prompt_is_named_by_its_line(tmp_path: Path) -> None:
    fits = "x" * MAX_PROMPT_CHARACTERS
    assert PromptPool.from_file(write(tmp_path, fits)).texts == (fits,)
    with pytest.raises(PromptError, match="line 3 has 513 characters"):
        PromptPool.from_file(write(tmp_path, f"# remark\na cat\n{fits}y\n"))


def test_a_missing_a_binary_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of prompts"):
        PromptPool.from_file(tmp_path / "none.txt")
    with pytest.raises(DataError, match="cannot be read"):
        PromptPool.from_file(write(tmp_path, b"\xff\xfe\x00a"))
    with pytest.raises(DataError, match="cannot be read"):
        PromptPool.from_file(tmp_path)
    with write(tmp_path, "").open("r+b") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(DataError, match="larger than 64 MiB"):
        PromptPool.from_file(tmp_path / "prompts.txt")


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_what_is_no_regular_file_is_refused_without_reading_it(tmp_path: Path, kind: str) -> None:
    # Read without a bound the device fills the memory; to open a pipe that nobody writes to waits for ever.
    path = {"device": Path("/dev/zero"), "pipe": tmp_path / "pipe", "folder": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(DataError, match="cannot be read as prompts: it is no regular file"):
        PromptPool.from_file(path)


def test_a_file_that_grows_while_it_is_read_is_read_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.prompts.MAX_FILE_BYTES", 2**20)
    path = write(tmp_path, "a cat\n")
    before = path.stat()
    with path.open("r+b") as file:
        file.truncate(2**20 + 1)
    monkeypatch.setattr(Path, "stat", lambda self, **_: before)  # its size as it was
    with pytest.raises(DataError, match="larger than 1 MiB"):
        PromptPool.from_file(path)


def test_a_pool_holds_at_most_what_a_message_may_carry(tmp_path: Path) -> None:
    assert MAX_PROMPTS <= records.MAX_PROMPTS
    assert MAX_PROMPT_CHARACTERS <= records.MAX_PROMPT_CHARACTERS
    assert MAX_CHARACTERS_TOGETHER <= records.MAX_PROMPT_CHARACTERS_TOGETHER
    lines = [f"prompt {i}" for i in range(MAX_PROMPTS + 1)]
    assert len(PromptPool(tuple(lines[:-1]))) == MAX_PROMPTS
    with pytest.raises(PromptError, match="too many"):
        PromptPool.from_file(write(tmp_path, "\n".join(lines)))


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ((), "no prompt"),
        (("a", ""), "prompt 2 is empty"),
        (("a", " b"), "begins or ends with a blank"),
        (("a", "a"), "twice"),
        (("a\nb",), "one line"),
        (("a\u2028b",), "one line"),  # a line end to splitlines, and so to a run directory's prompts.txt
        (("a\0b",), "one line"),
        (("\ud800",), "not valid Unicode"),
        (("x" * 513,), "513 characters"),
    ],
)
def test_a_pool_from_another_machine_holds_only_clean_prompts(texts: tuple[str, ...], reason: str) -> None:
    with pytest.raises(PromptError, match=reason):
        PromptPool(texts)


def test_one_prompt_is_cleaned_or_refused() -> None:
    assert clean_prompt("  ein roter Kreis\n") == "ein roter Kreis"
    with pytest.raises(PromptError, match="the prompt is empty") as error:
        clean_prompt("  ")
    assert error.value.exit_code == 9
