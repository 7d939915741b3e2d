"""Prompts in the model's own words: one thread describes, so that no language model is called by two at once.

What waits for it was let in before and counts under the time of its request; whoever leaves is not described for.
Not here: how a description is made (`server.prompting`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from server.prompting import Description, PromptPipeline
from server.serving.errors import of_ours
from shared.errors import PromptError


class Describer:
    """The thread, and the pipeline that it alone uses for descriptions.

    Attributes:
        pipeline: any thread may ask it for unknown words.
    """

    def __init__(self, pipeline: PromptPipeline) -> None:
        self.pipeline = pipeline
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="describing")

    async def describe(self, text: str, *, previous: Sequence[str] = ()) -> Description:
        """
        Args:
            previous: what was said before, oldest first.
        Raises:
            ApiError: a text has no word, or is none.
        """
        loop = asyncio.get_running_loop()
        found: Description | None = None
        # One by one, so that after a client has left, or its time is over, only the one under way goes on.
        for place, each in enumerate((*previous, text)):
            try:
                found = await loop.run_in_executor(self._thread, self._one, each, found)
            except PromptError as error:
                raise of_ours(error, param="previous" if place < len(previous) else "prompt") from None
        assert found is not None
        return found

    def stop(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _one(self, text: str, previous: Description | None) -> Description:
        return self.pipeline.describe(text, previous=previous)
