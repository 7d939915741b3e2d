"""Texts to words, the same in every script: what hashed embeddings and the reading of prompts have in common.

Released models depend on it: another split is another text encoder (`shared.text.HASHING_VERSION`).
Not here: what words mean (`server.thesaurus`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Scripts written without blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
)
PIECES = re.compile(f"[{UNSPACED}]|[^{UNSPACED}]+")


def split_words(text: str) -> list[str]:
    """Words without case and width: runs of letters, marks and digits, single characters of unspaced scripts, symbols.

    "Ein GROSSER roter Kreis!" -> ["ein", "grosser", "roter", "kreis"]; "红色圆" -> ["红", "色", "圆"].
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return [piece for run in _runs(folded) for piece in PIECES.findall(run)]


def _runs(text: str) -> Iterator[str]:
    run = ""
    for character in text:
        category = unicodedata.category(character)
        if category[0] in "LNM" and not "\ufe00" <= character <= "\ufe0f":  # no variation selectors of emoji
            run += character
            continue
        if run:
            yield run
        run = ""
        if category == "So":
            yield character
    if run:
        yield run
