"""Prompts in the model's own words: one thread describes, so that no language model is called by two at once.

Conversations are described whole, first come first served: texts of many in turn would let none of them end in time.
What would wait longer than it may is refused at once; whoever leaves is not described for, but for the text under way.
Not here: how a description is made (`server.prompting`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from server.prompting import Description, PromptPipeline
from server.serving.errors import ApiError, of_ours
from server.serving.load import MOST_RETRY_SECONDS
from server.serving.serving_thread import ServingThread, settle
from shared.errors import PromptError

SHARE = 0.5  # of a request's time that describing may be expected to take: texts differ, and drawing comes after
FIRST_SECONDS = 1.0  # taken for those of a text before the first was described: a model with 50,000 captions needs them
_WEIGHT = 0.2  # of a text that took less than usual; one that took more counts at once


@dataclass(eq=False)
class _Conversation:
    """Texts, oldest first; the last is what is asked for.

    Attributes:
        left: texts that are not yet described.
        done: of the last; cancelled by whoever no longer wants it.
    """

    texts: tuple[str, ...]
    left: int
    done: Future[Description] = field(default_factory=Future)


class Describer(ServingThread):
    """The thread, what waits for it, and the pipeline that it alone uses for descriptions. Any thread may `submit`.

    Args:
        most_texts: that wait, at most.
        within_seconds: that a request may take, its drawing included.
    """

    def __init__(self, pipeline: PromptPipeline, *, most_texts: int, within_seconds: float) -> None:
        super().__init__("describing")
        self._pipeline = pipeline
        self._most_texts, self._most_seconds = most_texts, SHARE * within_seconds
        self._seconds_a_text: float | None = None
        self._waiting: list[_Conversation] = []  # the first is under way

    def waiting(self) -> list[Future[Description]]:
        return [conversation.done for conversation in self._waiting]

    @property
    def texts(self) -> int:
        """That wait, with the one under way."""
        with self.changed:
            return sum(conversation.left for conversation in self._waiting)

    def submit(self, text: str, *, previous: Sequence[str] = ()) -> Future[Description]:
        """The description of `text`, later. Its `cancel` is always obeyed, but for a text that is being described.

        Args:
            previous: what was said before, oldest first.
        Raises:
            ApiError: (429) it would wait too long; one conversation alone never does. The future raises it where a
                text has no word, or is none.
        """
        conversation = _Conversation((*previous, text), left=len(previous) + 1)
        with self.changed:
            self.check_not_stopped()
            texts = self.texts + conversation.left
            seconds = texts * (FIRST_SECONDS if self._seconds_a_text is None else self._seconds_a_text)
            if self._waiting and (texts > self._most_texts or seconds > self._most_seconds):
                raise ApiError(
                    429, "as many texts wait to be described as can be; come again after the seconds in Retry-After",
                    code="rate_limit_exceeded",
                    # In which half of them should be done.
                    retry_after=min(MOST_RETRY_SECONDS, max(1, math.ceil(seconds / 2))),
                )  # fmt: skip
            conversation.done.add_done_callback(lambda _: self._forget(conversation))
            self._waiting.append(conversation)
            self.changed.notify()
        return conversation.done

    def _forget(self, conversation: _Conversation) -> None:
        with self.changed:
            self._waiting.remove(conversation)

    def run(self) -> None:
        while conversation := self._next():
            found: Description | None = None
            try:
                for text in conversation.texts:
                    if self.stopped or conversation.done.cancelled():
                        break
                    began = time.monotonic()
                    found = self._pipeline.describe(text, previous=found)
                    self._described(conversation, time.monotonic() - began)
                else:
                    assert found is not None
                    settle(conversation.done, found)
            except PromptError as error:
                settle(conversation.done, of_ours(error, param="previous" if conversation.left > 1 else "prompt"))
            except Exception as error:
                settle(conversation.done, error)
            del conversation, found  # nothing of a request is held until the next one comes

    def _next(self) -> _Conversation | None:
        """The first that waits; `None` once stopped."""
        with self.changed:
            self.changed.wait_for(lambda: self._waiting or self.stopped)
            return None if self.stopped else self._waiting[0]

    def _described(self, conversation: _Conversation, seconds: float) -> None:
        with self.changed:
            conversation.left -= 1
            usual = seconds if self._seconds_a_text is None else self._seconds_a_text
            self._seconds_a_text = max(seconds, usual + (seconds - usual) * _WEIGHT)
