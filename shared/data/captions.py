"""A caption as it is used: blanks collapsed, cut at the public maximum, never empty."""

from __future__ import annotations

import unicodedata

from shared.data.source import UnusableRow

INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")  # control, format (zero-width blanks and joiners), separators


def clean_caption(text: str, *, max_characters: int) -> str:
    """`text` without line breaks and surplus blanks, at most `max_characters` long.

    Raises:
        UnusableRow: nothing visible is left, or it is not Unicode text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UnusableRow("its text is not valid UTF-8") from None
    text = " ".join(text.split())[:max_characters].rstrip()
    if all(unicodedata.category(character) in INVISIBLE for character in text):
        raise UnusableRow("the caption is empty")
    return text
