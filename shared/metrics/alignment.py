"""Do pictures show what their prompts say? By a model that embeds both in one space: CLIP score and retrieval.

    clip score   how near a picture is to its prompt, 0 to 100; says little without the floor and chance beside it
    retrieval    whether a picture finds its prompt among all prompts, and a prompt its picture: recall at 1, 5, 10

The floor is the same figure for real pictures with their own captions; typical pictures can get past it.
Not covered: prompts that say the same in other words count as different ones, so retrieval calls a right picture wrong
where its prompt has a synonym among the others; and a generator can please one model, that is why it is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from shared.errors import DataError
from shared.metrics import Gallery, Measurement, Pictures, Setting
from shared.metrics.dual_encoder import DualEncoder, Embedded, dual_encoder, embedded
from shared.metrics.figure import Figure, mean_interval

RANKS = (1, 5, 10)
SHOWN = 8  # pictures of a gallery
TIE = 1e-6  # cosines of float32 vectors that are nearer are equal: the same picture in another batch rounds otherwise
ROWS = 1024  # pictures that are compared with all texts at once


@dataclass(frozen=True, eq=False)
class _Alignment:
    """What both metrics are of: a model that embeds texts and pictures, and the floor's pictures in it."""

    setting: Setting
    encoder: DualEncoder
    real: Embedded

    @classmethod
    def prepare(cls, setting: Setting) -> Self:
        """Raises `DataError` when no model was named or it cannot be had."""
        encoder = dual_encoder(setting)
        return cls(setting, encoder, embedded(setting, setting.public.floor))


class ClipScore(_Alignment):
    """The mean of `100 * max(cos(picture, prompt), 0)`: 0 is unrelated, 100 the same direction.

    CLIP's own cosines of matching pairs lie near 0.3, so scores near 30 are usual there and are no share of anything.
    Hessel et al. define `w * max(cos, 0)` with w = 2.5: that is this score times 0.025. Chance is the mean over all
    ways to give each picture another of the prompts.
    Source: Hessel et al. 2021, "CLIPScore", https://arxiv.org/abs/2104.08718; the factor of 100 as in torchmetrics.
    """

    def measure(self, pictures: Pictures) -> Measurement:
        found = embedded(self.setting, pictures)
        scores, floor = clip_scores(found), clip_scores(self.real)
        others = scores_of_other_texts(found)
        notes = fitted_note(self.encoder)
        if others is None:
            notes.append("there is one prompt, so there is no score by chance: give several different prompts")
        figure = Figure(
            "clip score",
            float(scores.mean()),
            mean_interval(scores, seed=self.setting.seed),
            "higher",
            n=len(scores),
            reference=self.setting.public.floor.name,
            reference_n=len(floor),
            extractor=self.encoder.name,
            seeds={"pictures": [pictures.seed], "resampling": [self.setting.seed]},
            floor=float(floor.mean()),
            floor_n=len(floor),
            at_floor_n=float(scores[: len(floor)].mean()) if len(floor) < len(scores) else None,
            chance=None if others is None else float(others.mean()),
            warning=self._blindness(floor),
        )
        order = np.argsort(-scores, kind="stable")
        galleries = [
            _gallery("best by clip", "Best by CLIP score", order[:SHOWN], scores, pictures),
            _gallery("worst by clip", "Worst by CLIP score", order[::-1][:SHOWN], scores, pictures),
        ]
        return Measurement([figure], galleries=galleries, notes=notes)

    def _blindness(self, floor: np.ndarray) -> str:
        """Whether the model prefers the captions of real pictures to other captions at all."""
        others = scores_of_other_texts(self.real)
        if others is None or mean_interval(floor - others, seed=self.setting.seed).low > 0:
            return ""
        return "this model cannot tell the captions of real pictures from other captions: the score says nothing here"


class Retrieval(_Alignment):
    """Recall at k: how often the text of a picture is among the k nearest texts, and a picture of a text likewise.

    Image to text: each picture ranks the P different prompts. Text to image: each prompt ranks P pictures, one of each
    prompt; the i-th pool holds the i-th picture of each prompt, over as many pools as prompts have pictures on average,
    and a prompt with fewer pictures begins again with its first. Ties are broken by a fair draw, of which the expected
    value is taken: pictures that all look alike to the model get chance, k / P.
    Real pictures are ranked among as many captions as there are prompts where the public set has them, the prompts
    themselves first. Source of the protocol: Karpathy & Fei-Fei 2015, https://arxiv.org/abs/1412.2306.
    """

    def measure(self, pictures: Pictures) -> Measurement:
        """Raises `DataError` when the pictures have only one prompt."""
        found = embedded(self.setting, pictures)
        number = len(found.words)
        ranks = [k for k in RANKS if k < number]
        if not ranks:
            raise DataError(
                "all pictures have one prompt, so there is nothing to retrieve among",
                hint="measure pictures of several different prompts",
            )
        real = as_many_texts(self.real, found.words)
        notes = fitted_note(self.encoder)
        for k in RANKS[len(ranks) :]:
            notes.append(f"recall at {k} is left out: there are {number} different prompts, and {k} hold them all")
        if len(real.words) < number:
            notes.append(
                f"real pictures are ranked among {len(real.words)} captions, all that there are, and generated ones"
                f" among {number} prompts: the floor is easier than the figure, its chance is k / {len(real.words)}"
            )
        figures = []
        for direction, hits in (("image to text", image_to_text), ("text to image", text_to_image)):
            values, floor = hits(found, ranks), hits(real, ranks)
            for column, k in enumerate(ranks):
                comparable = k < len(real.words)
                figures.append(
                    Figure(
                        f"{direction} recall at {k}",
                        float(values[:, column].mean()),
                        mean_interval(values[:, column], seed=self.setting.seed),
                        "higher",
                        n=len(found),
                        reference=self.setting.public.floor.name,
                        reference_n=len(self.real),
                        extractor=self.encoder.name,
                        seeds={"pictures": [pictures.seed], "resampling": [self.setting.seed]},
                        floor=float(floor[:, column].mean()) if comparable else None,
                        floor_n=len(real) if comparable else None,
                        chance=k / number,
                    )
                )
        return Measurement(figures, notes=notes)


def clip_scores(found: Embedded) -> np.ndarray:
    """`(N,)` float64 in 0 to 100: of each picture with its own text."""
    cosines = (found.pictures.astype(np.float64) * found.texts[found.own]).sum(axis=1)
    scores: np.ndarray = 100 * np.clip(cosines, 0.0, 1.0)
    return scores


def scores_of_other_texts(found: Embedded) -> np.ndarray | None:
    """`(N,)`: the mean score of each picture with the other texts; `None` where there is one text."""
    number = len(found.words)
    if number < 2:
        return None
    texts = found.texts.astype(np.float64)
    sums = np.empty(len(found))
    for start in range(0, len(found), ROWS):
        cosines = found.pictures[start : start + ROWS].astype(np.float64) @ texts.T  # (rows, P)
        sums[start : start + ROWS] = 100 * np.clip(cosines, 0.0, 1.0).sum(axis=1)
    means: np.ndarray = np.maximum(sums - clip_scores(found), 0.0) / (number - 1)
    return means


def image_to_text(found: Embedded, ranks: Sequence[int]) -> np.ndarray:
    """`(N, len(ranks))`: the chance of each picture's text to be among its k nearest, 0 or 1 without ties."""
    texts = found.texts.astype(np.float64)
    parts = []
    for start in range(0, len(found), ROWS):
        scores = found.pictures[start : start + ROWS].astype(np.float64) @ texts.T  # (rows, P)
        parts.append(_hits(scores, found.own[start : start + ROWS], ranks))
    return np.concatenate(parts)


def text_to_image(found: Embedded, ranks: Sequence[int]) -> np.ndarray:
    """`(pools * P, len(ranks))`: the same of each text among the pictures of each pool."""
    number = len(found.words)
    of_each = [np.flatnonzero(found.own == text) for text in range(number)]
    texts = found.texts.astype(np.float64)
    parts = []
    for i in range(-(-len(found) // number)):
        pool = [rows[i % len(rows)] for rows in of_each]
        scores = texts @ found.pictures[pool].astype(np.float64).T  # (P, P): its own picture is on the diagonal
        parts.append(_hits(scores, np.arange(number), ranks))
    return np.concatenate(parts)


def _hits(scores: np.ndarray, own: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """`(N, P)` scores and the column of each row's own to `(N, len(ranks))` chances to be among the k highest."""
    mine = np.take_along_axis(scores, own[:, None], axis=1)
    above = (scores > mine + TIE).sum(axis=1)
    tied = (np.abs(scores - mine) <= TIE).sum(axis=1)  # its own is one of them
    hits: np.ndarray = np.clip((np.array(ranks) - above[:, None]) / tied[:, None], 0.0, 1.0)
    return hits


def as_many_texts(real: Embedded, prompts: Sequence[str]) -> Embedded:
    """The real pictures of at most `len(prompts)` different captions: those that are prompts first."""
    asked = set(prompts)
    wanted = [text for text in real.words if text in asked] + [text for text in real.words if text not in asked]
    kept = set(wanted[: len(prompts)])
    return real.only(np.flatnonzero([real.words[own] in kept for own in real.own]))


def fitted_note(encoder: DualEncoder) -> list[str]:
    if not encoder.fitted_on:
        return []
    return [
        f"the two models were fitted to each other on the public pictures of {encoder.fitted_on}: compare these figures"
        f" with others by {encoder.name} only, never with published ones"
    ]


def _gallery(name: str, title: str, rows: np.ndarray, scores: np.ndarray, pictures: Pictures) -> Gallery:
    shown = [(f"{pictures.prompts[row]} ({scores[row]:.1f})", pictures.images[row : row + 1]) for row in rows]
    return Gallery(name, title, shown)
