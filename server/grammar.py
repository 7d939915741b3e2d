"""The public grammar of a model: what its public prompts have in common, found from those prompts alone.

Prompts that are equal in all but one word are one template with a blank there; the words seen there are its values.
Templates share all their prompts' words and no other, so every sentence that they make is in the model's vocabulary,
though perhaps in a combination that no prompt has. Prompts that are like no other are templates without a blank.
Not covered: which combinations make sense together; free captions, whose templates are mostly single sentences.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from server.thesaurus import is_small, meanings
from shared.words import UNSPACED, split_words

LONGEST_VALUE = 4  # words of a value, such as "Ankle boot", among values of one word
LONGEST_TOPIC = 6  # words; of longer sentences the first run that names something
MOST_SENTENCES = 20_000
_TOKENS = re.compile(rf"\s*(?:[{UNSPACED}]|[^\s{UNSPACED}]+)")


@lru_cache(2**17)
def words_of(text: str) -> tuple[str, ...]:
    """`split_words`, once for each token, value or sentence."""
    return tuple(split_words(text))


@dataclass(frozen=True)
class Slot:
    """A blank of a template.

    Attributes:
        place: of its token in the template.
        name: what its values are, in a word: "colour", "background"; or its first values where no word is known.
        values: in the order of the prompts, written as there.
    """

    place: int
    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """Constant tokens, each with the blank before it, and slots.

    Attributes:
        tokens: of its first prompt; those at the places of slots are stand-ins.
        slots: in order.
        prompts: how many public prompts it covers.
    """

    tokens: tuple[str, ...]
    slots: tuple[Slot, ...]
    prompts: int

    def render(self, values: Mapping[int, str]) -> str:
        """A sentence; `values` by the place of their slot."""
        parts = list(self.tokens)
        for slot in self.slots:
            blank = parts[slot.place][: len(parts[slot.place]) - len(parts[slot.place].lstrip())]
            parts[slot.place] = blank + values[slot.place]
        return "".join(parts)

    @cached_property
    def constants(self) -> tuple[str, ...]:
        """Its constant words, folded, in order; small ones are among them."""
        places = {slot.place for slot in self.slots}
        return tuple(w for place, token in enumerate(self.tokens) if place not in places for w in words_of(token))

    @cached_property
    def topic_slot(self) -> Slot | None:
        """The slot at the end of the first run of words that name something: "star" of "a small star on a mat"."""
        by_place = {slot.place: slot for slot in self.slots}
        for run in self._runs:
            if run[-1] in by_place:
                return by_place[run[-1]]
        return None

    def topic(self, values: Mapping[int, str]) -> str:
        """What a sentence is of: the value of the topic's slot, or else the sentence without its first small words."""
        if self.topic_slot is not None:
            return values[self.topic_slot.place]
        sentence = self.render(values)
        parts = _TOKENS.findall(sentence)
        while parts and all(map(is_small, words_of(parts[0]))):
            parts = parts[1:]
        if not parts or len(parts) > LONGEST_TOPIC:
            parts = [self.tokens[place] for place in next(iter(self._runs), range(0))]
        return "".join(parts).strip() or sentence

    def after(self, slot: Slot) -> str:
        """The constant word that follows `slot` and that it says something about, folded: "background"; or ""."""
        words = self._constant_at(slot.place + 1)
        return words[0] if words and not is_small(words[0]) else ""

    def before(self, slot: Slot) -> tuple[str, ...]:
        """Small constant words between `slot` and whatever stands before it: ("on", "a")."""
        found: list[str] = []
        for place in range(slot.place - 1, -1, -1):
            words = self._constant_at(place)
            if not words or not all(map(is_small, words)):
                break
            found[:0] = words
        return tuple(found)

    @cached_property
    def _runs(self) -> tuple[range, ...]:
        """Places of neighbouring tokens that are no small words, one range a run."""
        by_place = {slot.place: slot for slot in self.slots}

        def names_something(place: int) -> bool:
            texts = by_place[place].values if place in by_place else (self.tokens[place],)
            return any(not is_small(word) for text in texts for word in words_of(text))

        groups = itertools.groupby(range(len(self.tokens)), key=names_something)
        runs = [list(places) for named, places in groups if named]
        return tuple(range(run[0], run[-1] + 1) for run in runs)

    def _constant_at(self, place: int) -> tuple[str, ...]:
        if place >= len(self.tokens) or any(slot.place == place for slot in self.slots):
            return ()
        return words_of(self.tokens[place])


class Grammar:
    """Templates of public prompts, those of most prompts first.

    Attributes:
        prompts: as given.
        templates: at least one.
        tokens: that differ, in the order of the prompts, written as there.
        words: their words, folded, in this order.
    """

    def __init__(self, prompts: Sequence[str]) -> None:
        assert prompts, "a model has prompts"
        self.prompts = tuple(prompts)
        tokens = [tuple(_TOKENS.findall(prompt)) or (prompt,) for prompt in self.prompts]
        self.templates = _templates(tokens)
        self.tokens = tuple(dict.fromkeys(token.strip() for prompt in tokens for token in prompt))
        self.words = tuple(dict.fromkeys(word for token in self.tokens for word in words_of(token)))

    @cached_property
    def topics(self) -> tuple[str, ...]:
        """What its sentences are of, each once."""
        found: dict[str, None] = {}
        for template in self.templates:
            if template.topic_slot is not None:
                found.update(dict.fromkeys(template.topic_slot.values))
            else:
                values = [slot.values for slot in template.slots][:3]
                for combination in itertools.islice(itertools.product(*values), 20):
                    chosen = {slot.place: slot.values[0] for slot in template.slots}
                    chosen |= {slot.place: v for slot, v in zip(template.slots, combination, strict=False)}
                    found[template.topic(chosen)] = None
        return tuple(found)

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """The prompts, and what their templates make beside them where that is at most `MOST_SENTENCES`."""
        found = dict.fromkeys(self.prompts)
        for template in self.templates:
            count = 1
            for slot in template.slots:
                count *= len(slot.values)
            if len(found) + count > MOST_SENTENCES:
                continue
            for values in itertools.product(*(slot.values for slot in template.slots)):
                places = (slot.place for slot in template.slots)
                found[template.render(dict(zip(places, values, strict=True)))] = None
        return tuple(found)

    def parse(self, text: str) -> tuple[Template, dict[int, str]] | None:
        """The template and the values that make `text`, case and punctuation aside; `None` where none does."""
        words = words_of(text)
        if not words:
            return None
        for template in self._by_word.get(words[0], ()):
            values = _fit(template, words)
            if values is not None:
                return template, values
        return None

    @cached_property
    def _by_word(self) -> dict[str, list[Template]]:
        """Templates by the words that a sentence of theirs may begin with."""
        found: dict[str, list[Template]] = defaultdict(list)
        for template in self.templates:
            firsts = [template.tokens[0]]
            if template.slots and template.slots[0].place == 0:
                firsts = list(template.slots[0].values)
            if not words_of(firsts[0]):
                firsts = [template.render({slot.place: slot.values[0] for slot in template.slots})]
            for word in dict.fromkeys(words[0] for first in firsts if (words := words_of(first))):
                found[word].append(template)
        return found


def _fit(template: Template, words: tuple[str, ...]) -> dict[int, str] | None:
    """Values of the slots with which `template` has just these words."""
    by_place = {slot.place: slot for slot in template.slots}
    hopeless: set[tuple[int, int]] = set()  # places from which it was tried; values may begin alike

    def from_place(place: int, at: int) -> dict[int, str] | None:
        if place == len(template.tokens):
            return {} if at == len(words) else None
        if (place, at) in hopeless:
            return None
        texts = by_place[place].values if place in by_place else (template.tokens[place],)
        for text in texts:
            part = words_of(text)
            if words[at : at + len(part)] == part:
                rest = from_place(place + 1, at + len(part))
                if rest is not None:
                    return {place: text, **rest} if place in by_place else rest
        hopeless.add((place, at))
        return None

    return from_place(0, 0)


# ---- templates of prompts ------------------------------------------------------------------------------------


def _templates(tokens: Sequence[tuple[str, ...]]) -> tuple[Template, ...]:
    families = _families(tokens)
    columns = [_columns([tokens[i] for i in family]) for family in families]
    counts = [len(family) for family in families]
    _absorb(families, tokens, columns, counts)
    order = sorted((i for i, count in enumerate(counts) if count), key=lambda i: (-counts[i], families[i][0]))
    return tuple(_template(tokens[families[i][0]], columns[i], counts[i]) for i in order)


def _families(tokens: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Prompts by number, together where one leads to the other by changes of one token at a time."""
    leader = list(range(len(tokens)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    by_length: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(tokens):
        by_length[len(prompt)].append(i)
    for length, members in by_length.items():
        for place in range(length):
            seen: dict[tuple[int, int], int] = {}
            for i in members:
                # Hashes in place of texts: tens of thousands of long prompts would not fit beside each other.
                key = (hash(tokens[i][:place]), hash(tokens[i][place + 1 :]))
                first = seen.setdefault(key, i)
                if first != i:
                    leader[max(find(i), find(first))] = min(find(i), find(first))
    families: dict[int, list[int]] = defaultdict(list)
    for i in range(len(tokens)):
        families[find(i)].append(i)
    return list(families.values())


def _columns(tokens: Sequence[tuple[str, ...]]) -> list[dict[str, None]]:
    """Of each place the different tokens, in order."""
    return [dict.fromkeys(column) for column in zip(*tokens, strict=True)]


def _absorb(
    families: Sequence[list[int]], tokens: Sequence[tuple[str, ...]], columns: list[list[dict[str, None]]],
    counts: list[int],
) -> None:  # fmt: skip
    """Small families that are a larger one with a longer value in one slot become part of it."""
    large = sorted((i for i, family in enumerate(families) if len(family) >= 3), key=lambda i: -counts[i])[:50]
    for small in sorted(range(len(families)), key=lambda i: counts[i]):
        for host in large:
            if host == small or not counts[host] or counts[host] < counts[small]:
                continue
            place = _place_of_longer_value([tokens[i] for i in families[small]], columns[host])
            if place is not None:
                extra = len(tokens[families[small][0]]) - len(columns[host])
                for i in families[small]:
                    columns[host][place]["".join(tokens[i][place : place + extra + 1])] = None
                counts[host] += counts[small]
                counts[small] = 0
                break


def _place_of_longer_value(small: Sequence[tuple[str, ...]], host: Sequence[dict[str, None]]) -> int | None:
    """The slot of `host` in which the prompts `small` have one longer value, the fewest different ones; or `None`."""
    extra = len(small[0]) - len(host)
    if not 0 < extra < LONGEST_VALUE:
        return None
    best: tuple[int, int] | None = None
    for place, column in enumerate(host):
        if len(column) < 2:
            continue
        others = [p for p in range(len(host)) if p != place]
        if all(prompt[p if p < place else p + extra] in host[p] for prompt in small for p in others):
            different = len({prompt[place : place + extra + 1] for prompt in small})
            if best is None or different < best[0]:
                best = (different, place)
    return None if best is None else best[1]


def _template(tokens: tuple[str, ...], columns: Sequence[dict[str, None]], prompts: int) -> Template:
    bare = Template(tokens, tuple(Slot(p, "", tuple(c)) for p, c in enumerate(columns) if len(c) > 1), prompts)
    slots: list[Slot] = []
    for slot in bare.slots:
        values = tuple(dict.fromkeys(value.strip() for value in slot.values))
        name = _name(values, bare.after(slot), {other.name for other in slots})
        slots.append(Slot(slot.place, name, values))
    return Template(tokens, tuple(slots), prompts)


def _name(values: Sequence[str], after: str, taken: set[str]) -> str:
    kinds = Counter(kind for value in values for kind in _kinds(value))
    kind = max(kinds, key=lambda k: kinds[k], default="")
    if kind and kinds[kind] * 2 > len(values) and kind not in taken:
        return kind
    if after and after not in taken:
        return after
    return "/".join(values[:3]) + ("/..." if len(values) > 3 else "")


def _kinds(value: str) -> Iterator[str]:
    yield from {meaning.kind for word in words_of(value) for meaning in meanings(word)}
