"""From what a person writes to a description in a model's own words, one visible stage after another.

    unicode      normal form, no invisible characters, emoji read by name, one line
    language     by script and small words
    keywords     words that name something, and what the model knows of each
    topic        the nearest of the model's own topics
    description  a sentence of the public grammar: by a causal language model, or by rules

All that it knows of a model are its public prompts. A description is made of the model's words alone, whatever the
text says: a text that gives orders is read as words like any other. Not here: the grammar (`server.grammar`), words and
their meanings (`server.wording`, `server.thesaurus`), the rules (`server.filling`), and drawing (`server.generator`).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from server.filling import Filler, Filling
from server.grammar import Grammar, words_of
from server.thesaurus import UNDETERMINED, find_language
from server.wording import FORM, MOST_WORDS, SURE, Vocabulary, Word, clean_text, plain_words
from shared.errors import PromptError, UsageError
from shared.prompts import clean_prompt
from shared.registry import nearest_name_hint

if TYPE_CHECKING:
    from server.language_model import LanguageModel

STAGES = ("unicode", "language", "keywords", "topic", "description")
RULES, AS_WRITTEN = "rules", "as written"
SHOWN = 12  # entries of a list within a note
EXAMPLES = 6  # public prompts that a language model sees
LOOKED_UP = 16  # words of a text that `unknown_words` looks at


@dataclass(frozen=True)
class Stage:
    """What one stage got, what it made of it, and what there is to say about that, in words."""

    name: str
    got: str
    made: str
    note: str


@dataclass(frozen=True)
class Description:
    """
    Attributes:
        text: as given.
        cleaned: after the Unicode stage.
        language: ISO 639-1, or "und".
        keywords: words that name something, folded, each once, in order.
        topic: the nearest of the model's own topics; "" where that stage is off.
        description: what goes to the encoder.
        writer: "rules", "language model ID", or "as written".
        unknown: word that the model was not trained on to the nearest that it knows, nearest first; [] if none is.
        keeps_latents: a change of the previous description: with its seed it stays the same picture, changed.
        stages: what each stage did.
    """

    text: str
    cleaned: str
    language: str
    keywords: list[str]
    topic: str
    description: str
    writer: str
    unknown: dict[str, list[str]]
    keeps_latents: bool
    stages: list[Stage]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


class PromptPipeline:
    """Describes in the words of one model. Build it once; threads may share it.

    Attributes:
        grammar: of the model's public prompts.
    """

    def __init__(self, prompts: Sequence[str], *, language_model: str | None = None) -> None:
        """
        Args:
            prompts: the public prompts of the model, `Generator.prompts`.
            language_model: id or folder of a causal language model of `transformers`; without one rules write.
        Raises:
            PromptError: there is no prompt.
            DataError: there is no such language model, or it cannot be used.
        """
        if not prompts:
            raise PromptError("the model has no public prompts", hint="name a model that was trained with some")
        self.grammar = Grammar(prompts)
        self._vocabulary = Vocabulary(self.grammar)
        self._filler = Filler(self.grammar, self._vocabulary)
        self._model: LanguageModel | None = None
        self._lock = threading.Lock()
        if language_model:
            from server.language_model import LanguageModel  # loads torch, seconds

            self._model = LanguageModel.load(language_model)

    def describe(
        self, text: str, *, previous: Description | None = None, stages: Collection[str] | None = None
    ) -> Description:
        """
        Args:
            text: what a person wrote, in any script, at most 4096 characters.
            previous: what was described before; "the same but larger" changes that.
            stages: names of those that run; default all. Without "description" the text goes on as it is.
        Raises:
            PromptError: the text is empty, too long, binary, no valid Unicode, or has no word.
            UsageError: there is no such stage.
        """
        on = set(STAGES if stages is None else stages)
        for name in sorted(on - set(STAGES)):
            raise UsageError(f"unknown stage '{name}'", hint=nearest_name_hint(name, list(STAGES)))
        done: list[Stage] = []
        if "unicode" in on:
            cleaned, note = clean_text(text, known=self._vocabulary.words)
            done.append(Stage("unicode", text, cleaned, note))
        else:
            cleaned = clean_prompt(text, place="the text")
        language = UNDETERMINED
        if "language" in on:
            found = find_language([word for word, _ in plain_words(cleaned)], cleaned)
            language = found.code
            done.append(Stage("language", cleaned, language, found.why))
        words = self._vocabulary.read(cleaned, language)
        keywords: list[str] = []
        unknown: dict[str, list[str]] = {}
        if "keywords" in on:
            keywords = list(dict.fromkeys(word.text for word in words if not word.small))
            unknown = self._unknown(words, language)
            done.append(Stage("keywords", cleaned, ", ".join(keywords), self._about_words(cleaned, words, unknown)))

        filling = self._filler.parsed(cleaned)
        written = filling is not None  # it is a sentence of the grammar already
        change = previous is not None and not written and self._filler.is_change(words)
        if previous is not None and change:
            filling = self._filler.changed(words, self._base(previous))
        filling = filling or self._filler.fill(words)
        before = previous.description if previous is not None and change else ""
        # "larger" names nothing that a language model could say better, and "thanks" asks for no other picture.
        understood = filling.score > 0 or bool(filling.notes) or all(word.small for word in words)
        by_rules = written or (change and understood)
        model = None if by_rules else self._model
        topic = ""
        if "topic" in on:
            choice = filling.topic_choice
            named = model is None or (filling.score > 0 and (choice is None or choice.asked))
            topic = filling.topic if named or change else ""  # else the language model chooses
            done.append(Stage("topic", ", ".join(keywords), topic, self._about_topic(filling, words, topic, before)))
        if "description" not in on:
            as_is = clean_prompt(cleaned, place="the text")
            return Description(text, cleaned, language, keywords, topic, as_is, AS_WRITTEN, unknown, False, done)

        another = change and self._filler.wants_another(words)
        if written:
            described, writer, note = filling.sentence, AS_WRITTEN, "it is a sentence of the model's grammar already"
        elif model is None:
            described, writer, note = filling.sentence, RULES, _about_filling(filling, words, before=before)
        else:
            described, writer, note = self._by_language_model(model, cleaned, filling, words, before)
            if "topic" in on and (chosen := self._filler.parsed(described)) is not None:
                topic = chosen.topic
        if change:
            same = "the same picture" if described == before else "the same picture, changed"
            note += "; new latents: another picture" if another else f"; the latents stay: {same}"
        done.append(Stage("description", f"{before} + {cleaned}" if change else cleaned, described, note))
        keeps = change and not another
        return Description(text, cleaned, language, keywords, topic, described, writer, unknown, keeps, done)

    def unknown_words(self, text: str) -> dict[str, list[str]]:
        """`Description.unknown` of the first `LOOKED_UP` words of `text`, at a part of the cost of describing it."""
        try:
            cleaned, _ = clean_text(text, known=self._vocabulary.words)
        except PromptError:
            return {}  # it has no word
        cleaned = " ".join(cleaned.split()[:LOOKED_UP])
        language = find_language([word for word, _ in plain_words(cleaned)], cleaned).code
        return self._unknown(self._vocabulary.read(cleaned, language), language)

    def _base(self, previous: Description) -> Filling:
        """The sentence of `previous`, or the nearest one where it was no sentence of the grammar."""
        parsed = self._filler.parsed(previous.description)
        return parsed or self._filler.fill(self._vocabulary.read(previous.description, previous.language))

    def _unknown(self, words: Sequence[Word], language: str) -> dict[str, list[str]]:
        return {
            word.text: self._vocabulary.nearest(word, language)
            for word in words
            if not word.small and word.text not in self._vocabulary.words and word.strength < FORM
        }

    # ---- sentences by a language model ----

    def _by_language_model(
        self, model: LanguageModel, cleaned: str, filling: Filling, words: Sequence[Word], before: str
    ) -> tuple[str, str, str]:
        """(description, writer, note); by rules where what the model writes cannot be used."""
        by_rules = _about_filling(filling, words, before=before)
        request, sentences, kind = cleaned, self.grammar.sentences, "of the grammar"
        if before:  # one thing changes, the others stay
            request, sentences, kind = f"{before}; {cleaned}", filling.variants, "that change one thing"
        try:
            with self._lock:
                sentence = model.write(request, sentences=sentences, examples=self._examples)
                note = f"the likeliest for {model.name} among {len(sentences)} sentences {kind}"
                if lacking := self._lacking(sentence, filling, words):
                    note = f"{model.name} first wrote '{sentence}', which does not say {', '.join(lacking)}"
                    sentences = tuple(s for s in sentences if not self._lacking(s, filling, words))
                    if len(sentences) < 2:
                        return filling.sentence, RULES, f"{note}, and nothing else was left open; {by_rules}"
                    sentence = model.write(request, sentences=sentences, examples=self._examples)
                    note += f"; then the likeliest among the {len(sentences)} that do"
        except PromptError as error:
            return filling.sentence, RULES, f"{error.message}; {by_rules}"
        return sentence, f"language model {model.name}", note

    def _lacking(self, sentence: str, filling: Filling, words: Sequence[Word]) -> list[str]:
        """What the text surely asks for and `sentence` does not say."""
        parsed = self.grammar.parse(sentence)
        there = set(words_of(sentence))
        missing = []
        for place, choice in filling.choices.items():
            if not choice.places or choice.strength < SURE:
                continue
            same = parsed is not None and parsed[0] is filling.template
            says = parsed[1][place] == choice.value if parsed and same else there.issuperset(words_of(choice.value))
            if not says:
                missing.append(choice.value)
        negated = [word.matches for word in words if word.negated]
        avoided = {match for matches in negated for match, strength in matches.items() if strength >= SURE}
        return missing + [f"no {word}" for word in sorted(avoided & there)]

    @cached_property
    def _examples(self) -> list[tuple[str, str]]:
        """Requests and descriptions that show how it is done: public prompts, evenly spread, and their own words."""
        prompts = self.grammar.prompts
        chosen = dict.fromkeys(prompts[(2 * i + 1) * len(prompts) // (2 * EXAMPLES)] for i in range(EXAMPLES))
        named = {p: [word for word in words_of(p) if word in self._vocabulary.content] for p in chosen}
        return [(" ".join(reversed(words)) or prompt, prompt) for prompt, words in named.items()]

    # ---- what is said of it ----

    def _about_words(self, cleaned: str, words: Sequence[Word], unknown: Mapping[str, Sequence[str]]) -> str:
        named = dict.fromkeys(word.text for word in words if not word.small)
        if not named:
            return "no word names anything"
        known = [word for word in named if word not in unknown]
        parts = [f"known: {_listed(known)}" if known else "none is a word that the model was trained on"]
        if unknown:
            parts.append(f"not known: {list_unknown(unknown)}")
        if len(plain_words(cleaned)) > MOST_WORDS:
            parts.append(f"words after the first {MOST_WORDS} are not read")
        return "; ".join(parts)

    def _about_topic(self, filling: Filling, words: Sequence[Word], topic: str, before: str) -> str:
        choice = filling.topic_choice
        if choice is not None and choice.asked:
            return "named" if choice.strength >= FORM else f"nearest to {_quoted(words, choice.places)}"
        if before:
            return "as before"
        if not topic:
            return f"no word names one of its topics, so the language model chooses: {_listed(self.grammar.topics)}"
        if choice is None and filling.score:
            return "the nearest of its sentences"
        return f"no word names one of its topics, so the first is taken: {_listed(self.grammar.topics)}"


def list_unknown(unknown: Mapping[str, Sequence[str]]) -> str:
    """Unknown words with the nearest that the model knows, in one line: the first `SHOWN` of them."""
    return _listed([f"{word} (nearest: {', '.join(near)})" if near else word for word, near in unknown.items()])


def _about_filling(filling: Filling, words: Sequence[Word], *, before: str) -> str:
    """How the rules came to a sentence; `before` is the one that was changed, if one was."""
    if before and filling.sentence == before:
        unclear = not filling.notes and not filling.score and any(not word.small for word in words)
        return "; ".join([*(["no word of it is known"] if unclear else []), *filling.notes, "left as it was"])
    if not filling.score:
        return "no word of it is known: this is the model's first sentence, and says nothing of what was asked"
    asked, opened = [], []
    for slot in filling.template.slots:
        choice = filling.choices[slot.place]
        if not choice.asked:
            opened.append(slot.name)
        elif choice.places and choice.strength < FORM:
            asked.append(f"{slot.name} {choice.value} for {_quoted(words, choice.places)}")
        else:
            asked.append(f"{slot.name} {choice.value}")
    parts = [f"asked for: {', '.join(asked)}" if asked else "the nearest sentence"]
    if opened:
        parts.append(f"{'as before' if before else 'left open, so the first'}: {', '.join(opened)}")
    return "; ".join([*parts, *filling.notes])


def _quoted(words: Sequence[Word], places: Sequence[int]) -> str:
    return " ".join(f"'{words[place].text}'" for place in places)


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - SHOWN
    return ", ".join(texts[:SHOWN]) + (f" and {more} more" if more > 0 else "")
