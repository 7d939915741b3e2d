"""The local phase at a site: records in, one noised integer vector out. Pure torch, no Flower, no files.

Everything that depends on a unit (a record, or a subject with its records) passes one loss of that unit, one clip
and the noise before it is returned.
Not here: whether the site answers at all (`client.site`), and what a reply may look like (`client.gate`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from shared.adversarial import UPDATE_LATTICE, build_loss, fakes_gradient, real_record_loss, take_step, to_unit_range
from shared.config import RunConfig
from shared.data import ImageCaptionDataset, augment
from shared.errors import DataError
from shared.fakes import FakeBank
from shared.models import Discriminator, flat_parameters, load_flat_parameters
from shared.moments import CLIPPING_NORM as MOMENT_NORM
from shared.moments import clipped_moment_sum, clipped_subject_moment_sum, moment_features
from shared.optimizers import build_optimizer, set_learning_rate
from shared.privacy.arithmetic import BLOCK
from shared.privacy.dpsgd import clipped_gradient_sum, noised_sum
from shared.privacy.entropy import Entropy
from shared.privacy.plan import PrivacyPlan
from shared.prompts import PromptPool
from shared.text import CaptionEncoder

ROWS = 500  # of one pass when features are computed


@dataclass(frozen=True)
class PrivateBatch:
    """B units of one step, M images of each. A type of its own: nothing that trains the generator accepts it.

    Attributes:
        features: `(B, M V, h, w, c)`, the V views of an image side by side.
        captions: `(B, M, E)`, embeddings of the images' own captions.
        wrong_prompts: `(B, M, E)`, embeddings of public prompts that are not the image's caption.
    """

    features: Tensor
    captions: Tensor
    wrong_prompts: Tensor

    @property
    def conditioning(self) -> Tensor:
        """`(B, 2 M, E)`: of each image its caption, then its wrong prompt."""
        return torch.stack([self.captions, self.wrong_prompts], dim=2).flatten(1, 2)


@dataclass(frozen=True)
class StepFigures:
    """What a step was like, not noised: for the site's own log and for nobody else."""

    drawn: int
    loss: float
    clipped: float  # part of the units whose gradient was longer than the clipping norm
    median_norm: float

    def __str__(self) -> str:
        return (
            f"{self.drawn} drawn, loss {self.loss:.3f}, {self.clipped:.0%} clipped, median norm {self.median_norm:.3g}"
        )


def _tell_nobody(figures: StepFigures) -> None:
    pass


@dataclass(frozen=True)
class PrivateRecords:
    """A site's records, ready to draw from.

    Attributes:
        images: `(N, H, W, C)` uint8, kept for augmentation.
        features: `(N, h, w, c)` float16 of the images as they are; `None` when every view is augmented anew.
        embeddings: `(T, E)`, one row for each different caption.
        captions: the T different captions.
        caption_rows: for each of the N records the rows of `embeddings` that are its captions.
        subject_rows: for each subject the records that are its own; `None` where each record is a unit itself.
        without_subject: records that were left out since they name no subject; private, for the site's own log.
    """

    images: np.ndarray
    features: Tensor | None
    embeddings: Tensor
    captions: tuple[str, ...]
    caption_rows: tuple[tuple[int, ...], ...]
    subject_rows: tuple[np.ndarray, ...] | None = None
    without_subject: int = 0

    def __len__(self) -> int:
        return len(self.images)

    @property
    def units(self) -> int:
        """How many units there are to draw from; as private as their number of records."""
        return len(self.images) if self.subject_rows is None else len(self.subject_rows)


def prepare_records(
    dataset: ImageCaptionDataset, indices: np.ndarray, *, config: RunConfig, encoder: CaptionEncoder,
    discriminator: Discriminator,
) -> PrivateRecords:  # fmt: skip
    """Encodes captions once and, where no augmentation changes the images, their features once.

    Raises:
        DataError: the unit is the subject, and the data set or none of its rows names one.
    """
    named, subject_rows = indices, None
    if config.privacy.unit == "subject":
        named, subject_rows = rows_by_subject(dataset, indices)
    places: dict[str, int] = {}
    rows = tuple(
        tuple(places.setdefault(caption, len(places)) for caption in dataset.captions[int(index)]) for index in named
    )
    captions = tuple(places)
    images = dataset.images[named]
    features = None
    if not config.data.augmented:
        features = _features(discriminator, images, config=config, kind=torch.float16)
    embeddings = encoder.encode(captions).to(config.compute.device)
    return PrivateRecords(images, features, embeddings, captions, rows, subject_rows, len(indices) - len(named))


def rows_by_subject(dataset: ImageCaptionDataset, indices: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The rows that name a subject, and for each subject its places among them, in the order of the rows."""
    subjects = dataset.subjects()
    # Rows without a subject are not one subject "": whose they are is unknown, so no unit's noise covers them.
    named = np.array([index for index in indices if subjects[index]], dtype=np.int64)
    if not len(named):
        raise DataError(f"none of the {len(indices)} records of {dataset.name} names a subject")
    places: dict[str, list[int]] = {}
    for place, index in enumerate(named):
        places.setdefault(subjects[index], []).append(place)
    return named, tuple(np.array(rows, dtype=np.int64) for rows in places.values())


def site_gradient(
    discriminator: Discriminator, records: PrivateRecords,
    *, config: RunConfig, plan: PrivacyPlan, prompts: PromptPool, prompt_embeddings: Tensor, entropy: Entropy,
    server_round: int, local_step: int = 0, rows_cap: int | None = None,
    tell: Callable[[StepFigures], None] = _tell_nobody,
) -> np.ndarray:  # fmt: skip
    """One DP-SGD step's noised gradient sum of the real term.

    Args:
        rows_cap: public number of units that the work is padded to; a larger draw is cut at random, and its
            probability is part of delta (PRIVACY rule 15).
        tell: takes the step's private figures for the site's own log.
    Returns:
        `(num_parameters,)` int64 in units of `plan.lattice`. An empty draw is pure noise and counts as a step.
    """
    batch = draw_batch(
        discriminator, records, config=config, plan=plan, prompts=prompts, prompt_embeddings=prompt_embeddings,
        entropy=entropy, labels=(server_round, local_step), most=rows_cap,
    )  # fmt: skip
    loss = real_record_loss(
        build_loss(config.discriminator), wrong_prompt_weight=config.discriminator.wrong_prompt_weight
    )
    clipped = clipped_gradient_sum(
        discriminator, batch.features, batch.conditioning, loss,
        clipping_norm=plan.clipping_norm, kernel=config.privacy.kernel, padded_to=rows_cap,
    )  # fmt: skip
    if tell is not _tell_nobody:
        norms = clipped.norms
        tell(
            StepFigures(
                drawn=len(norms),
                loss=float(loss(clipped.logits).mean()) if len(norms) else math.nan,
                clipped=float((norms > plan.clipping_norm).float().mean()) if len(norms) else math.nan,
                median_norm=float(norms.median()) if len(norms) else math.nan,
            )
        )
    return noised_sum(clipped.total, plan=plan, entropy=entropy, labels=("noise", server_round, local_step))


def site_update(
    discriminator: Discriminator, records: PrivateRecords, fakes: FakeBank,
    *, config: RunConfig, plan: PrivacyPlan, prompts: PromptPool, prompt_embeddings: Tensor, entropy: Entropy,
    server_round: int, rows_cap: int | None = None, tell: Callable[[StepFigures], None] = _tell_nobody,
) -> np.ndarray:  # fmt: skip
    """`local-steps` noised steps with a fresh optimizer against a bank of fakes; every step is charged.

    Returns:
        `(num_parameters,)` int64, the parameter update in units of `UPDATE_LATTICE`. The discriminator
        that was passed in is changed.
    """
    before = flat_parameters(discriminator)
    loss = build_loss(config.discriminator)
    optimizer = build_optimizer(discriminator, config.discriminator_optimizer)
    set_learning_rate(optimizer, config.discriminator_optimizer, server_round, config.federation.rounds)
    features = _features(discriminator, fakes.images, config=config)  # (F, h, w, c)
    conditioning = prompt_embeddings[torch.from_numpy(fakes.prompt_indices).long()]
    # The public share of one site in the expected batch: not its own size, which nobody else may learn.
    expected_at_site = plan.expected_batch_size / plan.sites
    share = max(1, len(features) // config.federation.local_steps)
    for local_step in range(config.federation.local_steps):
        noised = site_gradient(
            discriminator, records, config=config, plan=plan, prompts=prompts, prompt_embeddings=prompt_embeddings,
            entropy=entropy, server_round=server_round, local_step=local_step, rows_cap=rows_cap, tell=tell,
        )  # fmt: skip
        start = local_step * share % len(features)
        part = slice(start, start + share)
        of_fakes = fakes_gradient(
            discriminator, features[part], conditioning[part], loss, clipping_norm=plan.clipping_norm
        )
        real = torch.from_numpy(noised).to(of_fakes.total) * (plan.lattice / expected_at_site)
        take_step(discriminator, optimizer, real + of_fakes.total / len(of_fakes.norms))
    update = flat_parameters(discriminator).astype(np.float64) - before
    lattice_units: np.ndarray = np.rint(update / UPDATE_LATTICE).astype(np.int64)
    return lattice_units


def site_moments(
    records: PrivateRecords, *, config: RunConfig, plan: PrivacyPlan, discriminator: Discriminator, entropy: Entropy
) -> np.ndarray:  # fmt: skip
    """The warm start's one release: noised caption-conditioned feature moments of all units (q = 1).

    Returns:
        `(moment_size,)` int64 in units of the moment plan's lattice.
    """
    features = records.features
    if features is None:
        features = _features(discriminator, records.images, config=config, kind=torch.float16)
    # A record with several captions enters with their mean embedding: one vector a unit, one clip.
    captions = torch.stack([records.embeddings[list(rows)].mean(dim=0) for rows in records.caption_rows])
    of = moment_features(config, discriminator.feature_shape)
    if records.subject_rows is None:
        total = clipped_moment_sum(features, captions, of)
    else:
        total = clipped_subject_moment_sum(features, captions, records.subject_rows, of)
    of_moments = replace(plan, noise_multiplier=plan.warm_start_noise_multiplier or 0.0, clipping_norm=MOMENT_NORM)
    return noised_sum(total, plan=of_moments, entropy=entropy, labels=("moments",))


def draw_batch(
    discriminator: Discriminator, records: PrivateRecords,
    *, config: RunConfig, plan: PrivacyPlan, prompts: PromptPool, prompt_embeddings: Tensor, entropy: Entropy,
    labels: tuple[int, int], most: int | None = None,
) -> PrivateBatch:  # fmt: skip
    """A Poisson draw of units: M images of each with their views, one caption and one wrong public prompt each."""
    units = entropy.poisson_draw(records.units, plan.sampling_rate, "draw", *labels)
    if most is not None and len(units) > most:
        units = np.sort(entropy.rng("cut", *labels).permutation(units)[:most])
    if records.subject_rows is None:
        slots = units[:, None]  # (B, M): an example is its one image
    else:
        slots = _images_of_subjects(
            [records.subject_rows[unit] for unit in units], count=config.privacy.images_per_subject,
            rng=entropy.rng("images", *labels),
        )  # fmt: skip
    chosen = slots.reshape(-1)
    rng = entropy.rng("views", *labels)
    if records.features is not None:
        features = records.features[torch.from_numpy(chosen)][:, None].float()
    else:
        views = to_unit_range(augment(records.images[chosen], config=config.data, rng=rng))  # (B M, V, C, H, W)
        flat = views.flatten(0, 1).to(config.compute.device)
        with torch.no_grad():
            features = discriminator.features(flat).unflatten(0, views.shape[:2])
    places = {text: place for place, text in enumerate(prompts.texts)}
    caption_rows = [records.caption_rows[i][rng.integers(len(records.caption_rows[i]))] for i in chosen]
    captions = records.embeddings[torch.tensor(caption_rows, dtype=torch.long)]
    own = np.array([places.get(records.captions[row], -1) for row in caption_rows], dtype=np.int64)
    # Uniform over the public prompts other than the record's own caption, where that is one of them.
    others = np.maximum(len(prompts) - (own >= 0), 1)
    wrong = (rng.random(len(chosen)) * others).astype(np.int64)
    wrong += (own >= 0) & (wrong >= own) & (len(prompts) > 1)
    near = np.flatnonzero(rng.random(len(chosen)) < config.discriminator.near_prompt_share)
    if len(near) and len(prompts) > 2:
        # Prompts that differ from the caption in one word teach what random ones, wrong in every word, do not.
        likeness = _likeness(captions[torch.from_numpy(near)], prompt_embeddings)  # (near, P)
        known = own[near] >= 0
        likeness[torch.from_numpy(np.flatnonzero(known)), torch.from_numpy(own[near][known])] = -torch.inf
        count = min(config.discriminator.near_prompts, len(prompts) - 1)
        nearest = likeness.topk(count, dim=1).indices.cpu().numpy()
        wrong[near] = nearest[np.arange(len(near)), rng.integers(count, size=len(near))]
    return PrivateBatch(
        features=features.unflatten(0, slots.shape).flatten(1, 2),
        captions=captions.unflatten(0, slots.shape),
        wrong_prompts=prompt_embeddings[torch.from_numpy(wrong)].unflatten(0, slots.shape),
    )


def _likeness(captions: Tensor, prompts: Tensor) -> Tensor:
    """`(B, P)` products of `(B, E)` and `(P, E)`, in blocks of one shape.

    Which prompts are nearest to a caption must not depend on what else was drawn, not even by a last bit that breaks a
    tie: another wrong prompt is another gradient (PRIVACY rule 2).
    """
    full = torch.cat([captions, captions.new_zeros(-len(captions) % BLOCK, captions.shape[1])])
    return torch.cat([block @ prompts.t() for block in full.split(BLOCK)])[: len(captions)]


def _images_of_subjects(subject_rows: Sequence[np.ndarray], *, count: int, rng: np.random.Generator) -> np.ndarray:
    """`(B, count)` rows: as many of each subject's images, at random; those of a small subject come again in turn.

    The bound is public, and every subject fills it: the shape tells nothing of how many images one has.
    """
    slots = np.empty((len(subject_rows), count), dtype=np.int64)
    for place, rows in enumerate(subject_rows):
        slots[place] = np.resize(rng.permutation(rows), count)
    return slots


def _features(
    discriminator: Discriminator, images: np.ndarray, *, config: RunConfig, kind: torch.dtype = torch.float32
) -> Tensor:
    """`(N, H, W, C)` uint8 to `(N, h, w, c)`, a few hundred rows at a time."""
    with torch.no_grad():
        parts = [
            discriminator.features(to_unit_range(images[i : i + ROWS]).to(config.compute.device)).to(kind)
            for i in range(0, len(images), ROWS)
        ]
    return torch.cat(parts)


def load_weights(discriminator: Discriminator, weights: np.ndarray) -> None:
    """The released weights of an instruction, `(num_parameters,)` float32, into the site's own copy."""
    load_flat_parameters(discriminator, weights)
