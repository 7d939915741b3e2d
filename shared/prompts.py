"""Public prompts: the only texts that the server, the generator and the wrong pairs ever see.

`PromptPool` is a type of its own, so that captions, which are private, cannot be passed where prompts belong.
A file of prompts is UTF-8, one prompt a line; blank lines and lines that start with `#` are left out.
Not covered: whether the person who wrote the file copied it from captions. Prompts must be public.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shared.errors import DataError, PromptError

MAX_PROMPTS = 2**16
MAX_PROMPT_CHARACTERS = 512
MAX_CHARACTERS_TOGETHER = 2**24
MAX_FILE_BYTES = 2**26


@dataclass(frozen=True)
class PromptPool:
    """Prompts in order, each once. `PromptError` where one is not as `clean_prompt` returns it."""

    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.texts:
            raise PromptError("there is no prompt", hint="name a file of public prompts, one a line: --prompts FILE")
        if len(self.texts) > MAX_PROMPTS or sum(map(len, self.texts)) > MAX_CHARACTERS_TOGETHER:
            raise PromptError(
                f"{len(self.texts)} prompts are too many",
                hint=f"at most {MAX_PROMPTS}, with {MAX_CHARACTERS_TOGETHER} characters together",
            )
        for number, text in enumerate(self.texts, 1):
            if clean_prompt(text, place=f"prompt {number}") != text:
                raise PromptError(f"prompt {number} begins or ends with a blank")
        if len(set(self.texts)) != len(self.texts):
            raise PromptError("a prompt stands twice in the pool")

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the prompts, one a line, 64 hex digits."""
        return hashlib.sha256("".join(f"{text}\n" for text in self.texts).encode()).hexdigest()

    @classmethod
    def from_file(cls, path: Path) -> PromptPool:
        """Reads a file of prompts; a prompt that stands in it twice counts once.

        Raises:
            DataError: the file is missing, no regular file, too large or not UTF-8.
            PromptError: it holds no prompt, too many, or one that is too long; the line is named.
        """
        hint = "a text file, UTF-8, one public prompt a line; never made from captions, which are private"
        try:
            # A device says that it has no bytes and never ends; to open a pipe waits for whoever writes.
            if not stat.S_ISREG(path.stat().st_mode):
                raise DataError(f"{path} cannot be read as prompts: it is no regular file", hint=hint)
            with path.open("rb") as file:
                encoded = file.read(MAX_FILE_BYTES + 1)
            if len(encoded) > MAX_FILE_BYTES:
                raise DataError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB", hint=hint)
            content = encoded.decode("utf-8-sig")
        except FileNotFoundError:
            raise DataError(f"no file of prompts at {path}", hint=hint) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as prompts: {error}", hint=hint) from None
        texts: list[str] = []
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip() and not line.lstrip().startswith("#"):
                texts.append(clean_prompt(line, place=f"{path}, line {number}"))
        if not texts:
            raise PromptError(f"{path} holds no prompt", hint=hint)
        return cls(_each_once(texts))


def clean_prompt(text: str, *, place: str = "the prompt") -> str:
    """One prompt without blanks around it; `PromptError` when it is empty, too long or not one line of text."""
    cleaned = text.strip()
    if not cleaned:
        raise PromptError(f"{place} is empty", hint="describe a picture in a few words")
    if len(cleaned) > MAX_PROMPT_CHARACTERS:
        raise PromptError(f"{place} has {len(cleaned)} characters", hint=f"at most {MAX_PROMPT_CHARACTERS} are read")
    try:
        cleaned.encode()
    except UnicodeEncodeError:
        raise PromptError(f"{place} is not valid Unicode") from None
    # Where a line ends must be the same for every reader of a file of prompts; NUL ends texts elsewhere.
    if len(cleaned.splitlines()) > 1 or "\0" in cleaned:
        raise PromptError(f"{place} is not one line of text", hint="write it without line breaks")
    return cleaned


def _each_once(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
