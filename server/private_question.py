"""The one question that a site's private records may be asked about a released model, and what a predictor is.

A classifier is trained on generated pictures alone, with their prompts as classes; asked is how often it names the
caption of a private record. Everything up to here is public: what touches the records is the site's own code, which
charges its ledger and answers with one noised figure (PRIVACY rule 16).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache

import numpy as np

from server.evaluation import pictures
from shared.errors import DataError
from shared.metrics.downstream import VERSION, SimpleConvnet, tell, train_convnet
from shared.private_data import CAPTION, Question
from shared.rundir import GeneratorModel

MOST_PROMPTS = 1000  # as classes of one classifier


def question_about(
    model: GeneratorModel, *, n: int, seed: int, epsilon: float, delta: float | None, progress: Callable[[str], None]
) -> Question:  # fmt: skip
    """About a classifier of `n` pictures of the model, evenly over its prompts; trained when it is first asked.

    Raises:
        DataError: the model has one prompt, too many of them, or more than there are pictures.
    """
    prompts, data = list(model.prompts), model.config.data
    if not 2 <= len(prompts) <= min(n, MOST_PROMPTS):
        raise DataError(
            f"a classifier of the model's {len(prompts)} prompts cannot be trained on {n} pictures",
            hint=f"it takes 2 to {MOST_PROMPTS} prompts, and a picture of each: raise --n",
        )

    @cache
    def network() -> SimpleConvnet:
        progress(f"training a classifier on {n:,} generated pictures")
        labels = np.arange(n) % len(prompts)
        made = pictures(model, [prompts[label] for label in labels], seed=seed, indices=range(n))
        return train_convnet(made, {CAPTION: labels}, seed)

    def predict(images: np.ndarray) -> list[str]:
        return [prompts[place] for place in tell(network(), images)[0]]

    weights = str(model.card["files"]["generator.safetensors"])
    about = json.dumps([VERSION, weights, prompts, n, seed])
    return Question(
        attribute=CAPTION, predict=predict, predictor_digest=hashlib.sha256(about.encode()).hexdigest(),
        model_digest=weights, epsilon=epsilon, delta=delta, image_size=data.image_size, channels=data.channels,
    )  # fmt: skip
