"""A person's text as words, each with what a model knows of it.

Characters that cannot be seen go, emoji are read by their Unicode name, and what is no text is refused. A word is known
as itself, as a form of a word, as one that means the same, as a typing error, or as a near meaning, in this order.
Not here: what the words of a text make together (`server.filling`).
"""

from __future__ import annotations

import difflib
import itertools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from server import thesaurus
from server.grammar import Grammar, words_of
from server.thesaurus import UNDETERMINED, Meaning, find_language, forms, is_small, meanings
from shared.errors import PromptError
from shared.words import UNSPACED, split_words

MOST_CHARACTERS = 4096
MOST_WORDS = 100  # of a text; later ones are not read
BINARY_SHARE = 0.1  # of characters that no text has
LONGEST_WORD = 60  # characters that are kept of one, enough for any language's
MOST_NEAREST = 4

# How well a word of the model answers one of the text.
EXACT, FORM, SYNONYM, SPELLING, NEAR = 1.0, 0.95, 0.9, 0.75, 0.5
SURE = SPELLING  # less is a suggestion

# Words of Unicode's names that say how a symbol is drawn, not what it shows.
_OF_FONTS = frozenset(["large", "medium", "small", "heavy", "sign", "symbol", "with", "of", "face"])
_NAMED_IN_OUTLINE = re.compile(r"\b(?:white|black)\b")
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SEGMENTS = re.compile(r"[,;.!?:|()\[\]{}\"“”«»—–\n。，、！？؛،]+")


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Attributes:
        text: folded.
        segment: number of its part of the text between punctuation; words of two segments do not belong together.
        small: names nothing.
        negated: "not red".
        matches: words of the model to how well they answer it, from 0 to 1.
    """

    text: str
    segment: int
    small: bool = False
    negated: bool = False
    matches: Mapping[str, float] = field(default_factory=dict)

    @property
    def strength(self) -> float:
        return max(self.matches.values(), default=0.0)


def clean_text(text: str, *, known: Collection[str] = ()) -> tuple[str, str]:
    """(one line of visible text, what was done to it).

    Args:
        known: words of the model: emoji among them stay as they are.
    Raises:
        PromptError: `text` is empty, too long, binary, or no valid Unicode.
    """
    if len(text) > MOST_CHARACTERS:
        raise PromptError(f"the text has {len(text)} characters", hint=f"at most {MOST_CHARACTERS} are read")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError("the text is not valid Unicode", hint="give it as UTF-8")
    given, text = text, _TERMINAL_CODES.sub(" ", text)
    strange = sum(c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Cn", "Co") and not c.isspace()) for c in text)
    if "\0" in text or strange > BINARY_SHARE * len(text):
        raise PromptError("the text looks like binary data", hint="describe a picture in a few words")
    normal = unicodedata.normalize("NFKC", text)
    if len(normal) > MOST_CHARACTERS:
        written_out = f"the text has {len(normal)} characters when written out"
        raise PromptError(written_out, hint=f"at most {MOST_CHARACTERS} are read")
    kept: list[str] = []
    hidden = emoji = 0
    for character in normal:
        category = unicodedata.category(character)
        if character.isspace():
            kept.append(" ")
        elif category in ("Cc", "Cf", "Cn", "Co") or character == "\ufffd" or "\ufe00" <= character <= "\ufe0f":
            # Marks of direction too: the line's own characters say in which direction they are read.
            hidden += not "\ufe00" <= character <= "\ufe0f"
            kept.append("" if category == "Cf" else " ")
        elif category in ("So", "Sk") and ord(character) > 0x2000 and character not in known:
            emoji += category == "So"
            kept.append(f" {_name_of(character)} ")
        else:
            kept.append(character)
    cleaned = " ".join("".join(kept).split())
    if not split_words(cleaned):
        problem = "is empty" if not text.strip() else "has no word"
        raise PromptError(f"the text {problem}", hint="describe a picture in a few words")
    done = []
    if text != given:
        done.append("a terminal's control codes removed")
    if normal != text:
        done.append("written in normal form")
    if hidden:
        done.append(f"{hidden} characters that cannot be seen removed")
    if emoji:
        done.append(f"{emoji} emoji read by their names")
    return cleaned, ", ".join(done) or "nothing to do"


def _name_of(character: str) -> str:
    name = unicodedata.name(character, "").lower()
    if not name or name.startswith(("regional indicator", "emoji modifier", "variation")):
        return ""
    if not re.search(r"\b(?:large|medium|small)\b.*\b(?:circle|square)\b|\bheart\b", name):
        name = _NAMED_IN_OUTLINE.sub("", name)  # "black star" is a filled one, in any colour
    return " ".join(word for word in re.split(r"[\s-]+", name) if word not in _OF_FONTS)


def plain_words(text: str) -> list[tuple[str, int]]:
    """(folded word, number of its segment); elisions and possessives are taken apart."""
    text = text.replace("’", "'")
    text = re.sub(r"\b(l|d|j|m|n|s|c|t|qu)'(?=\w)", r"\1 ", text, flags=re.IGNORECASE)
    text = re.sub(r"n't\b", " not", text, flags=re.IGNORECASE)
    text = re.sub(r"'(?:s|re|ll|ve|d|m)?\b", "", text, flags=re.IGNORECASE)
    return [(word, number) for number, part in enumerate(_SEGMENTS.split(text)) for word in split_words(part)]


class Vocabulary:
    """The words of a model's prompts, and which of them answers a word of a person.

    Attributes:
        words: all of them.
        language: of the prompts, or "und".
        content: words that name something.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.words = frozenset(grammar.words)
        self.language = find_language(grammar.words, " ".join(grammar.prompts[:100])).code
        self.content = frozenset(word for word in grammar.words if not is_small(word, self.language))
        self._by_form: dict[str, dict[str, None]] = defaultdict(dict)
        self._by_meaning: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        self._by_kind: dict[str, dict[str, None]] = defaultdict(dict)
        self._joined: dict[str, tuple[str, ...]] = {}
        self._by_initial: dict[str, list[str]] = defaultdict(list)
        self._as_shown: dict[str, str] = {}
        for word in grammar.words:  # in the order of the prompts, so that what is named first there is offered first
            if word not in self.content:
                continue
            for form in forms(word):
                self._by_form[form][word] = None
            for meaning in meanings(word, self.language):
                self._by_meaning[meaning.kind, meaning.name][word] = None
                self._by_kind[meaning.kind][word] = None
            self._by_initial[word[0]].append(word)
        for token in grammar.tokens:
            if len(parts := words_of(token)) > 1:  # "T-shirt/top": shirt, tshirt, t-shirt
                for part in parts:
                    self._as_shown.setdefault(part, re.sub(r"^\W+|\W+$", "", token))
                for first, second in itertools.pairwise(parts):
                    self._join((first, second))

    def _join(self, parts: tuple[str, str]) -> None:
        joined = "".join(parts)
        self._joined.setdefault(joined, parts)
        for meaning in meanings(joined):
            for part in parts:
                self._by_meaning[meaning.kind, meaning.name][part] = None

    def read(self, text: str, language: str = UNDETERMINED) -> list[Word]:
        """The first `MOST_WORDS` words of `text`, in order."""
        plain = plain_words(text)[:MOST_WORDS]
        found: list[Word] = []
        negated_in = -1  # the segment in which a negation waits for its word
        for place, (word, segment) in enumerate(plain):
            before = plain[place - 1][0] if place else ""
            if word in thesaurus.NEGATIONS and word not in self.content and not (word == "no" and language == "pt"):
                negated_in = segment
                found.append(Word(_short(word), segment, small=True))
                continue
            matches = self.matches(word, language)
            if self._is_small(word, before, language, matches):
                found.append(Word(_short(word), segment, small=True))
                continue
            following = plain[place + 1][0] if place + 1 < len(plain) else ""
            if _is_shade(word) and any(meaning.kind == "colour" for meaning in meanings(following, language)):
                matches = {}  # "dark blue" is not black
            found.append(Word(_short(word), segment, negated=segment == negated_in, matches=matches))
            if following not in thesaurus.AND_OR:
                negated_in = -1
        return _joined_where_unspaced(found)

    def _is_small(self, word: str, before: str, language: str, matches: Mapping[str, float]) -> bool:
        if word in self.content:
            return False
        if word == "one" and matches:  # of digits; "another one", "the green one" are none
            return before in thesaurus.ANOTHER | thesaurus.SAME | thesaurus.IT or before in self.content
        if word in thesaurus.GREATER | thesaurus.SMALLER and matches:
            return False  # without a description to change, "a larger star" is a large one
        return word in thesaurus.TALK or is_small(word, language)

    def matches(self, word: str, language: str = UNDETERMINED) -> dict[str, float]:
        """Words of the model that answer `word`, to how well."""
        if word in self.content:
            return {word: EXACT}
        for form in forms(word):
            if form in self.content:
                return {form: FORM}
        if word in self._by_form:
            return dict.fromkeys(self._by_form[word], FORM)
        if word in self._joined:
            return dict.fromkeys(self._joined[word], FORM)
        meant = meanings(word, language)
        for meaning in meant:
            if found := self._by_meaning.get((meaning.kind, meaning.name)):
                return dict.fromkeys(found, SYNONYM)
        near: dict[str, float] = {}
        for meaning in meant:
            for place, other in enumerate(_near(meaning)):
                for match in self._by_meaning.get((meaning.kind, other), ()):
                    near.setdefault(match, NEAR - place / 100)
        if near or meant:
            return near  # a word of the table is no typing error
        # A letter more, less or swapped. Of short words, "start" and "star", that makes another word too often.
        return {match: SPELLING for match in self._spelled_alike(word, 0.82) if len(match) >= 5}

    def nearest(self, word: Word, language: str = UNDETERMINED) -> list[str]:
        """The words of the model nearest to one that it does not have; [] where none is near."""
        if word.matches:
            near = sorted(word.matches, key=lambda match: -word.matches[match])
        else:
            kinds = [m.kind for m in meanings(word.text, language) if m.name not in thesaurus.SHADES]
            near = [match for kind in kinds for match in self._by_kind.get(kind, ())]
            near = near or self._spelled_alike(word.text, 0.7)
        # A part of "T-shirt" alone tells nobody anything; nor does a model's every word of a kind.
        return list(dict.fromkeys(self._as_shown.get(match, match) for match in near))[:MOST_NEAREST]

    def _spelled_alike(self, word: str, least: float) -> list[str]:
        """Words that begin alike and differ in a letter or two."""
        if not 3 <= len(word) <= 40:
            return []
        candidates = [other for other in self._by_initial[word[0]] if abs(len(other) - len(word)) <= 1]
        return difflib.get_close_matches(word, candidates, n=MOST_NEAREST, cutoff=least)


def _short(word: str) -> str:
    return word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD]}..."


def _is_shade(word: str) -> bool:
    return any(meaning.kind == "colour" and meaning.name in thesaurus.SHADES for meaning in meanings(word))


def _joined_where_unspaced(words: Sequence[Word]) -> list[Word]:
    """Neighbouring characters of unspaced scripts that the model does not know as one word, as they were written."""
    found: list[Word] = []
    for word in words:
        last = found[-1] if found else None
        if last is not None and last.segment == word.segment and _is_unknown_piece(word) and _is_unknown_piece(last):
            found[-1] = replace(last, text=last.text + word.text)
        else:
            found.append(word)
    return found


def _is_unknown_piece(word: Word) -> bool:
    return not word.small and not word.matches and re.fullmatch(f"[{UNSPACED}]+", word.text) is not None


def _near(meaning: Meaning) -> Sequence[str]:
    if meaning.step is None:
        return meaning.near
    steps = [other for other in thesaurus.scale(meaning.kind) if other.name != meaning.name]
    return [other.name for other in sorted(steps, key=lambda other: abs((other.step or 0) - (meaning.step or 0)))]
