"""A sentence of the public grammar for the words of a text, by rules: which template, and which value in each slot.

A word goes to the slot that has it among its values; its neighbours decide where several have it ("white" of a star or
of a ground), and keep it from where it does not belong: "blue background" makes no blue star. What no word asks for
takes the slot's first value, or stays as it was when a description is changed.
Not covered: sentences about several things. One slot takes one value, and what is left out is said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from server import thesaurus
from server.grammar import Grammar, Slot, Template, words_of
from server.thesaurus import ARTICLES, LIKE_ON, meanings
from server.wording import EXACT, FORM, Vocabulary, Word

MOST_TEMPLATES = 200  # that are looked at closely, of those that have most of the words
# Beside a word's strength from 0 to 1: what its neighbours say for a slot, what words of a sentence cost that nobody
# asked for, what speaks for the sentence that is being changed, and for another one with words of it, each.
NEIGHBOUR_BONUS, UNASKED, STAY_BONUS, KEPT_BONUS = 0.3, 0.1, 0.3, 0.15


@dataclass(frozen=True)
class Choice:
    """The value of a slot, and the words that ask for it, by place in the text; none where it was left open."""

    value: str
    places: tuple[int, ...] = ()
    strength: float = 0.0
    asked: bool = False


@dataclass
class Filling:
    """A template with a value in each slot.

    Attributes:
        choices: by the place of the slot.
        score: how well it answers the text; 0 where it answers none of it.
        notes: what could not be done, in words.
    """

    template: Template
    choices: dict[int, Choice]
    score: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[int, str]:
        return {place: choice.value for place, choice in self.choices.items()}

    @property
    def sentence(self) -> str:
        return self.template.render(self.values)

    @property
    def variants(self) -> tuple[str, ...]:
        """The sentence itself, and those that differ from it in one slot."""
        values = self.values
        others = [{**values, slot.place: value} for slot in self.template.slots for value in slot.values]
        return tuple(dict.fromkeys(self.template.render(each) for each in (values, *others)))

    @property
    def topic(self) -> str:
        return self.template.topic(self.values)

    @property
    def topic_choice(self) -> Choice | None:
        slot = self.template.topic_slot
        return None if slot is None else self.choices[slot.place]


class Filler:
    """Fills the templates of one grammar."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary) -> None:
        self.grammar, self.vocabulary = grammar, vocabulary
        self._templates_of: dict[str, list[int]] = defaultdict(list)
        for number, template in enumerate(grammar.templates):
            words = {word for slot in template.slots for value in slot.values for word in words_of(value)}
            for word in (words | set(template.constants)) & vocabulary.content:
                self._templates_of[word].append(number)
        self._slot_names = {slot.name for template in grammar.templates for slot in template.slots}

    def parsed(self, text: str) -> Filling | None:
        """`text` itself where it is a sentence of the grammar."""
        found = self.grammar.parse(text)
        if found is None:
            return None
        template, values = found
        return Filling(template, {place: Choice(v, (), EXACT, asked=True) for place, v in values.items()}, 1.0)

    def fill(self, words: Sequence[Word], base: Filling | None = None) -> Filling:
        """The template and the values that answer most of `words`; what is left open is as in `base`, or first."""
        hits: dict[int, float] = defaultdict(float)
        for word in words:
            for match, strength in word.matches.items():
                if not word.negated:
                    for number in self._templates_of.get(match, ()):
                        hits[number] += strength
        likely = sorted(hits, key=lambda number: (-hits[number], number))[:MOST_TEMPLATES]
        found = [self._fill(self.grammar.templates[number], words, base) for number in likely]
        found = [filling for filling in found if filling.score]
        if base is not None:
            there = self.vocabulary.content.intersection(words_of(base.sentence))
            for filling in found:
                filling.score += KEPT_BONUS * len(there.intersection(words_of(filling.sentence)))
            stays = self._fill(base.template, words, base)
            if stays.score:
                stays.score += STAY_BONUS + KEPT_BONUS * len(there)
            found = [*found, stays]
        if not found:
            found = [self._fill(self.grammar.templates[0], words, base)]
        return max(found, key=lambda filling: filling.score)

    def _fill(self, template: Template, words: Sequence[Word], base: Filling | None) -> Filling:
        may_be_of = _places_by_neighbours(template, words)
        answered = {match for word in words for match in word.matches}
        offers: list[tuple[float, int, int, Slot, Choice]] = []
        excluded: dict[int, set[str]] = defaultdict(set)
        for slot in template.slots:
            for value in slot.values:
                parts = [word for word in words_of(value) if word in self.vocabulary.content]
                if answered.isdisjoint(parts):
                    continue
                asked = _answers(parts, words)
                places = tuple(dict.fromkeys(place for place, _ in asked))
                if all(words[place].negated for place in places):
                    excluded[slot.place].add(value)
                    continue
                if not all(slot.place in may_be_of.get(place, {slot.place}) for place in places):
                    continue
                strength = sum(strength for _, strength in asked)
                bonus = NEIGHBOUR_BONUS if may_be_of.get(places[0]) == {slot.place} else 0.0
                score = strength + bonus - 0.5 * (1 - len(asked) / len(parts))
                choice = Choice(value, places, strength / len(asked), asked=True)
                offers.append((-score, places[0], slot.place, slot, choice))
        choices: dict[int, Choice] = {}
        used: set[int] = set()
        score = 0.0
        for cost, _, _, slot, choice in sorted(offers, key=lambda offer: offer[:3]):
            if slot.place not in choices and used.isdisjoint(choice.places):
                choices[slot.place] = choice
                used.update(choice.places)
                score -= cost
        constants = [word for word in dict.fromkeys(template.constants) if word in self.vocabulary.content]
        met = _answers(constants, [word if place not in used else _SILENT for place, word in enumerate(words)])
        score += sum(strength for _, strength in met)
        answers = bool(choices or met)
        notes = _left_over(template, words, choices, may_be_of, used)
        for slot in template.slots:
            if slot.place not in choices:
                value = _open_value(slot, template, base, excluded[slot.place])
                if value in excluded[slot.place]:
                    notes.append(f"it knows no other {slot.name}")
                choices[slot.place] = Choice(value, asked=bool(excluded[slot.place]))
                answers = answers or bool(excluded[slot.place])
        score -= UNASKED * (len(constants) - len(met))
        ordered = {slot.place: choices[slot.place] for slot in template.slots}
        return Filling(template, ordered, max(score, 1e-6) if answers else 0.0, notes)

    # ---- changes of what was described before ----

    def is_change(self, words: Sequence[Word]) -> bool:
        """Whether the words change a description ("now in green", "green"), or give a new one ("a green star")."""
        texts = {word.text for word in words if not word.negated}
        if texts & (thesaurus.SAME | thesaurus.CHANGE | thesaurus.ANOTHER | thesaurus.MORE | thesaurus.LESS):
            return True
        if _places_of_steps(words):
            return True
        if words and words[0].text in thesaurus.MAKE and texts & thesaurus.IT:
            return True
        filling = self.fill(words)
        if not filling.score:
            return True  # nothing of it is known: what was there stays
        if (choice := filling.topic_choice) is not None:
            return not choice.asked
        return not _answers([w for w in filling.template.constants if w in self.vocabulary.content], words)

    def wants_another(self, words: Sequence[Word]) -> bool:
        """ "another one" is another picture; "another colour" is not."""
        return any(word.text in thesaurus.ANOTHER for word in words) and not self._slots_to_vary(words)

    def changed(self, words: Sequence[Word], base: Filling) -> Filling:
        """`base` with what the words change in it."""
        base = replace(base, choices={place: Choice(choice.value) for place, choice in base.choices.items()})
        notes: list[str] = []
        changes = self._steps_taken(words, base, notes)
        to_vary = self._slots_to_vary(words)
        for slot in base.template.slots:
            if slot.name in to_vary:
                value = base.choices[slot.place].value
                following = slot.values[(slot.values.index(value) + 1) % len(slot.values)]
                changes[slot.place] = Choice(following, strength=EXACT, asked=True)
        start = replace(base, choices={**base.choices, **changes})
        quiet = [_SILENT if place in _places_of_steps(words) else word for place, word in enumerate(words)]
        filling = self.fill(quiet, start)
        for place, choice in changes.items():
            if filling.template is base.template and not filling.choices[place].asked:
                filling.choices[place] = choice
                filling.score += EXACT
        filling.notes[:0] = notes
        return filling

    def _slots_to_vary(self, words: Sequence[Word]) -> set[str]:
        """Names of slots that are to have another value: "another colour", "a different background"."""
        found: set[str] = set()
        for place, word in enumerate(words):
            if word.text in thesaurus.ANOTHER:
                followers = [_NAMES.get(follower.text, follower.text) for follower in words[place + 1 : place + 3]]
                found.update(name for name in followers if name in self._slot_names)
        return found

    def _steps_taken(self, words: Sequence[Word], base: Filling, notes: list[str]) -> dict[int, Choice]:
        direction = sum(_places_of_steps(words).values())
        if direction == 0:
            return {}
        for slot in base.template.slots:
            scale = _scale(slot)
            here = scale.get(base.choices[slot.place].value)
            if len(scale) < 2 or here is None:
                continue
            ahead = {value: step for value, step in scale.items() if (step - here) * direction > 0}
            if not ahead:
                notes.append(f"'{base.choices[slot.place].value}' is the {_END[direction > 0]} that it knows")
                return {}
            nearest = min(ahead, key=lambda value: abs(ahead[value] - here))
            return {slot.place: Choice(nearest, strength=EXACT, asked=True)}
        notes.append("it has no words for sizes")
        return {}


_SILENT = Word("", -1, small=True)
_END = {True: "largest", False: "smallest"}
# What people call slots, beside the names themselves.
_NAMES = {"color": "colour", "farbe": "colour", "couleur": "colour", "form": "shape", "forme": "shape", "kind": "shape"}


def _answers(parts: Iterable[str], words: Sequence[Word]) -> list[tuple[int, float]]:
    """For each of `parts` that a word of the text asks for: the place of the best one, and how well it does."""
    found = []
    for part in parts:
        offers = [(word.matches[part], -place) for place, word in enumerate(words) if part in word.matches]
        if offers:
            strength, place = max(offers)
            found.append((-place, strength))
    return found


def _places_by_neighbours(template: Template, words: Sequence[Word]) -> dict[int, set[int]]:
    """Of words whose neighbours tell: the places of the slots that they may be of.

    "blue background", "background: blue" and "on blue" speak of the ground, "black star" not.
    """
    found: dict[int, set[int]] = {}
    for slot in template.slots:
        noun = template.after(slot)
        # Only prepositions that stand before this one: "of" in "a photo of a shirt" tells nothing.
        prepositions = set(template.before(slot)) & LIKE_ON
        for place, word in enumerate(words):
            if word.small or noun in word.matches:
                continue
            follower = words[place + 1] if place + 1 < len(words) else _SILENT
            leaders = [w for w in words[max(place - 2, 0) : place] if not (w.small and w.text in ARTICLES)]
            leader = leaders[-1] if leaders else _SILENT
            if noun and noun in follower.matches and follower.segment == word.segment:
                found[place] = {slot.place}
                continue
            if place in found:
                continue
            after_noun = bool(noun) and noun in leader.matches and follower.small
            if after_noun or (prepositions and leader.text in LIKE_ON and leader.segment == word.segment):
                found[place] = {slot.place}
    topic = template.topic_slot
    if topic is None:
        return found
    topics = {word for value in topic.values for word in words_of(value)}
    for place, word in enumerate(words):
        if word.small or place in found:
            continue
        for follower in words[place + 1 :]:
            if follower.small or follower.segment != word.segment:
                break
            if follower.strength >= FORM and topics & follower.matches.keys():
                found[place] = {slot.place for slot in template.slots if slot.place <= topic.place}
                break
    return found


def _left_over(
    template: Template, words: Sequence[Word], choices: Mapping[int, Choice], may_be_of: Mapping[int, set[int]],
    used: set[int],
) -> list[str]:  # fmt: skip
    """Why words that the model knows found no place: two colours of one star, a colour that only grounds have."""
    notes = []
    by_place = {slot.place: slot for slot in template.slots}
    for place, word in enumerate(words):
        homes = [s for s in template.slots if any(m in words_of(v) for v in s.values for m in word.matches)]
        if place in used or word.negated or not homes:
            continue
        home, allowed = homes[0], may_be_of.get(place)
        if allowed is not None and len(allowed) == 1 and home.place not in allowed:
            about = by_place[min(allowed)]
            notes.append(f"'{word.text}' is no {about.name} that it knows ({', '.join(about.values[:12])})")
        elif allowed is not None and home.place not in allowed:
            notes.append(f"'{word.text}' is known only as {home.name}")
        elif home.place in choices and not word.matches.keys() & set(words_of(choices[home.place].value)):
            notes.append(f"only one {home.name} fits: '{word.text}' is left out")
    return notes


def _open_value(slot: Slot, template: Template, base: Filling | None, excluded: set[str]) -> str:
    """As in `base`, where that has the slot or one of its name; else the first that is not to be avoided."""
    if base is not None:
        for other in base.template.slots:
            same = other.place == slot.place if base.template is template else other.name == slot.name
            value = base.choices[other.place].value
            if same and value in slot.values and value not in excluded:
                return value
    return next((value for value in slot.values if value not in excluded), slot.values[0])


def _places_of_steps(words: Sequence[Word]) -> dict[int, int]:
    """Places of "larger", "more large", "smaller", ... to the direction, 1 or -1."""
    found: dict[int, int] = {}
    for place, word in enumerate(words):
        before = words[place - 1].text if place else ""
        following = words[place + 1] if place + 1 < len(words) else _SILENT
        if word.text in thesaurus.ALSO_NO_COMPARISON and following.segment == word.segment and not following.small:
            continue
        if word.text in thesaurus.GREATER:
            found[place] = 1
        elif word.text in thesaurus.SMALLER:
            found[place] = -1
        elif before in thesaurus.MORE | thesaurus.LESS and (steps := _steps_of(word.text)):
            found[place] = (1 if steps[0] > 1 else -1) * (1 if before in thesaurus.MORE else -1)
    return found


def _scale(slot: Slot) -> dict[str, int]:
    """Values that stand on a scale, to their step."""
    steps = {value: [step for word in words_of(value) for step in _steps_of(word)] for value in slot.values}
    return {value: found[0] for value, found in steps.items() if found}


def _steps_of(word: str) -> list[int]:
    return [meaning.step for meaning in meanings(word) if meaning.step is not None]


