"""The subject as privacy unit: who is drawn, what enters, one loss, one clip, one moment vector (rules 3, 5, 6, 26).

Each image is of one colour and has a caption of its own, so that a batch tells which images entered.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_site import instruction
from test_training import Bench, settings
from torch import Tensor
from toy_federation import make_site, toy_config

from client.policy import SitePolicy
from client.site import Site, SiteRefusal
from client.training import PrivateBatch, draw_batch, prepare_records, site_gradient, site_moments
from shared import moments
from shared.adversarial import real_record_loss
from shared.config import RunConfig
from shared.data import ImageCaptionDataset
from shared.losses import LOSSES
from shared.moments import MomentFeatures, clipped_moment_sum, clipped_subject_moment_sum
from shared.privacy.entropy import SystemEntropy
from shared.records import RefusalCode, SiteReply

WRONG_PROMPT_WEIGHT = 0.5


def by_subject(images: int = 4, **changes: Any) -> RunConfig:
    """Every subject is drawn, and nothing is noised, unless a test says otherwise."""
    return settings(
        **{"privacy.name": "none", "privacy.unit": "subject", "privacy.images-per-subject": images,
           "privacy.sampling-rate": 1.0, "discriminator.wrong-prompt-weight": WRONG_PROMPT_WEIGHT, **changes}
    )  # fmt: skip


def people(subjects: Sequence[str], *, seed: int = 0) -> ImageCaptionDataset:
    """One image for each entry: number i is of colour (i // 256, i % 256, random), its caption is 'picture i'."""
    places = np.arange(len(subjects))
    images = np.zeros((len(subjects), 8, 8, 3), dtype=np.uint8)
    images[..., 0], images[..., 1] = (places // 256)[:, None, None], (places % 256)[:, None, None]
    images[..., 2] = np.random.default_rng(seed).integers(256, size=images.shape[:3])
    return ImageCaptionDataset(
        images=images, captions=[(f"picture {place}",) for place in places], attributes={"subject_id": list(subjects)}
    )


def of_sizes(sizes: Sequence[int]) -> list[str]:
    return [f"p{subject}" for subject, size in enumerate(sizes) for _ in range(size)]


def draw(bench: Bench, *, step: int = 0, **changes: Any) -> PrivateBatch:
    return draw_batch(bench.discriminator, bench.records, labels=(1, step), **bench.keywords(**changes))


def entered(batch: PrivateBatch, images: int) -> list[list[int]]:
    """The numbers of the images of each unit that was drawn; without augmentation the features are the pixels."""
    pixels = np.rint((batch.features[:, :, 0, 0, :2].numpy() + 1) * 127.5).astype(int)  # (B, M, 2)
    assert batch.features.shape[1] == images
    return (256 * pixels[..., 0] + pixels[..., 1]).tolist()  # type: ignore[no-any-return]


# ---- the draw (rule 6)


@pytest.mark.parametrize("images", [1, 4, 7])
def test_at_most_so_many_images_of_a_subject_enter_each_with_its_own_caption(images: int) -> None:
    subjects = of_sizes([1, 2, 3, 4, 5, 6, 50])
    bench = Bench(by_subject(images), data=people(subjects))
    seen: set[int] = set()
    for step in range(60):
        batch = draw(bench, step=step)
        rows = entered(batch, images)
        assert [{subjects[row] for row in of_one} for of_one in rows] == [{f"p{place}"} for place in range(7)]
        for of_one, own in zip(rows, (1, 2, 3, 4, 5, 6, 50), strict=True):
            counts = [of_one.count(row) for row in set(of_one)]
            assert len(counts) == min(images, own)
            assert max(counts) - min(counts) <= 1
        expected = bench.encoder.encode([f"picture {row}" for of_one in rows for row in of_one])
        assert torch.equal(batch.captions.flatten(0, 1), expected)
        seen |= {row for of_one in rows for row in of_one}
    # Which images of many enter changes: of the 50, 60 draws of one image show 35 on average, of more nearly all.
    assert len(seen) > 21 + 25


def test_subjects_are_drawn_at_the_rate_however_many_images_they_have() -> None:
    sizes, rate, steps = [1] * 20 + [50] * 20, 0.3, 400
    bench = Bench(by_subject(2), data=people(of_sizes(sizes)))
    plan = replace(bench.plan, sampling_rate=rate)
    drawn = np.zeros((steps, len(sizes)))
    subjects = np.repeat(np.arange(len(sizes)), sizes)
    for step in range(steps):
        rows = entered(draw(bench, step=step, plan=plan), 2)
        drawn[step, [subjects[of_one[0]] for of_one in rows]] = 1
    deviations = (drawn.sum(axis=0) - steps * rate) / (steps * rate * (1 - rate)) ** 0.5
    # Each is near a standard normal: chi-square of 40. |z| < 5 fails a right draw in about 1e-5 (its tail is longer).
    assert abs((deviations**2 - 1).sum() / (2 * len(sizes)) ** 0.5) < 5
    # Those of 50 images against those of one: a normal of variance 1; false alarm below 6e-7.
    assert abs(deviations[:20].sum() - deviations[20:].sum()) / len(sizes) ** 0.5 < 5
    # Batch sizes are Binomial(40, 0.3), variance 8.4: a fixed size, or subjects that come together, have another.
    z = (drawn.sum(axis=1).var() / (len(sizes) * rate * (1 - rate)) - 1) / (2 / steps) ** 0.5
    assert abs(z) < 5


def test_an_empty_draw_of_subjects_is_a_step() -> None:
    bench = Bench(by_subject(3), data=people(of_sizes([2, 2])))
    batch = draw(bench, plan=replace(bench.plan, sampling_rate=0.0))
    assert batch.features.shape == (0, 3, 8, 8, 3)
    assert batch.conditioning.shape == (0, 6, 16)
    assert not bench.gradient(plan=replace(bench.plan, sampling_rate=0.0)).any()


def test_a_deployed_sites_source_draws_the_images_too() -> None:
    bench = Bench(by_subject(2), data=people(of_sizes([50])))
    rows = [entered(draw(bench, entropy=SystemEntropy()), 2)[0] for _ in range(2)]
    assert rows[0] != rows[1]  # false alarm 1 / (50 * 49)


def test_subjects_of_one_image_are_examples_to_the_bit() -> None:
    data = people(of_sizes([1] * 30))
    subjects = Bench(by_subject(1, **{"privacy.sampling-rate": 0.5}), data=data)
    examples = Bench(settings(**{"privacy.name": "none", "privacy.sampling-rate": 0.5}), data=data)
    assert examples.records.subject_rows is None
    for server_round in (1, 2, 3):
        assert np.array_equal(subjects.gradient(server_round), examples.gradient(server_round))


# ---- records without a subject (rule 17)


def test_records_without_a_subject_never_enter_and_are_not_one_subject() -> None:
    subjects = ["", "a", "", "b", "a", "", ""]
    data = people(subjects)
    bench = Bench(by_subject(4), data=data)
    assert [rows.tolist() for rows in bench.records.subject_rows or ()] == [[0, 2], [1]]
    assert (len(bench.records), bench.records.units, bench.records.without_subject) == (3, 2, 4)
    for step in range(20):
        assert {row for of_one in entered(draw(bench, step=step), 4) for row in of_one} == {1, 3, 4}
    kept = [place for place, subject in enumerate(subjects) if subject]
    alone = Bench(by_subject(4), data=data)
    alone.records = prepare_records(
        data, np.array(kept), config=alone.config, encoder=alone.encoder, discriminator=alone.discriminator
    )
    assert np.array_equal(bench.gradient(), alone.gradient())
    assert np.array_equal(release_moments(bench), release_moments(alone))


def test_subjects_are_those_of_a_sites_own_rows() -> None:
    bench = Bench(by_subject(4), data=people(of_sizes([3, 3, 3])))
    records = prepare_records(
        people(of_sizes([3, 3, 3])), np.array([1, 2, 6]), config=bench.config, encoder=bench.encoder,
        discriminator=bench.discriminator,
    )  # fmt: skip
    assert [rows.tolist() for rows in records.subject_rows or ()] == [[0, 1], [2]]


def answer(folder: Path, **arrays: np.ndarray) -> SiteReply:
    """Of a site with four images, under a run whose unit is the subject."""
    make_site(folder, policy=SitePolicy.for_simulation(max_epsilon=math.inf, delta=0.5, unit="subject"))
    names = np.array(["cat"])
    np.savez(folder / "data.npz", x_train=people("abcd").images, y_train=np.zeros(4, int), class_names=names, **arrays)
    config = toy_config({"privacy.name": "none", "privacy.unit": "subject", "privacy.sampling-rate": 1.0})
    return Site(folder, simulated=True).answer(instruction(config))


def test_a_site_notes_how_many_records_name_no_subject_and_not_whose_the_others_are(tmp_path: Path) -> None:
    answer(tmp_path, subject_id=np.array(["Johanna Quixbury", " ", "", "Johanna Quixbury"]))
    log = (tmp_path / "site.log").read_text()
    assert "2 records are ready" in log
    assert "2 records name no subject and are not used" in log
    assert "Johanna" not in log


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [({}, "has no column 'subject_id'"), ({"subject_id": np.array([""] * 4)}, "none of the 4 records")],
)
def test_a_site_whose_data_name_no_subjects_refuses_with_the_code_of_all_that_depends_on_data(
    arrays: dict[str, np.ndarray], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(SiteRefusal, match=reason) as refusal:
        answer(tmp_path, **arrays)
    assert refusal.value.code == RefusalCode.SITE


# ---- one loss, one clip (rules 3 and 5)


@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("name", LOSSES.names())
def test_the_loss_of_a_unit_with_one_image_is_that_of_an_example_to_the_bit(name: str, views: int) -> None:
    logits = torch.randn(33, views, 2, generator=torch.Generator().manual_seed(0))
    loss = LOSSES.get(name)()
    matched, wrong = logits.unbind(dim=2)
    expected = (loss.real(matched) + 0.3 * loss.fake(wrong)).mean(dim=1)
    assert torch.equal(real_record_loss(loss, wrong_prompt_weight=0.3)(logits), expected)


def loop(bench: Bench, batch: PrivateBatch, *, views: int, clip: float) -> Tensor:
    """The definition: one subject at a time, each view of each image through the model alone, float64, one clip."""
    model = copy.deepcopy(bench.discriminator).double().requires_grad_(True)
    names = sorted(name for name, _ in model.named_parameters())
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for features, captions, wrong_prompts in zip(
        batch.features.double(), batch.captions.double(), batch.wrong_prompts.double(), strict=True
    ):
        losses = []
        for place, view in enumerate(features):
            image = place // views
            real = model(view[None, None], captions[image][None, None])
            wrong = model(view[None, None], wrong_prompts[image][None, None])
            losses.append(torch.log1p(torch.exp(-real)) + WRONG_PROMPT_WEIGHT * torch.log1p(torch.exp(wrong)))
        model.zero_grad()
        (sum(losses) / len(losses)).backward()  # type: ignore[union-attr]
        gradient = torch.cat([dict(model.named_parameters())[name].grad.reshape(-1) for name in names])
        total += gradient * min(1.0, clip / gradient.norm().item())
    return total


@pytest.mark.parametrize("kernel", ["fused", "opacus"])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("images", [1, 2, 4])
def test_clipped_sum_equals_a_loop_over_single_subjects(images: int, views: int, kernel: str) -> None:
    clip, changes = 0.6, {"data.views": views, "data.flip": views > 1, "data.brightness": 0.5 * (views > 1)}
    config = by_subject(images, **{**changes, "privacy.kernel": kernel, "privacy.clipping-norm": clip})
    bench = Bench(config, data=people(of_sizes([1, 2, 3, 4, 5, 6])))
    batch = draw(bench)
    got = torch.from_numpy(bench.gradient(1)).double() * bench.plan.lattice
    assert torch.allclose(got, loop(bench, batch, views=views, clip=clip), atol=2e-5)
    # The clip takes part: without it the sum is another one.
    assert not torch.allclose(got, loop(bench, batch, views=views, clip=1e6), atol=1e-2)


def test_a_subject_moves_the_whole_reply_by_at_most_the_clipping_norm() -> None:
    """200 random sites with and without one whole subject, of up to 20 images."""
    rng = np.random.default_rng(0)
    moves = []
    for images in (1, 2, 4, 8):
        bench = Bench(by_subject(images, **{"privacy.clipping-norm": 0.3}), data=people("a"))
        for seed in range(50):
            # The last in the order of the rows, so that the others' images and prompts are drawn as before.
            data = people(of_sizes([*rng.integers(1, 7, size=rng.integers(1, 6)), 1 + seed % 20]), seed=seed)
            subjects = data.attributes["subject_id"]
            bench.records = bench.prepare(data)
            whole = bench.gradient()
            bench.records = prepare_records(
                data, np.flatnonzero(np.array(subjects) != subjects[-1]), config=bench.config,
                encoder=bench.encoder, discriminator=bench.discriminator,
            )  # fmt: skip
            moved = np.linalg.norm((whole - bench.gradient()) * bench.plan.lattice)
            assert moved <= bench.plan.sensitivity(len(whole))
            moves.append(moved / bench.plan.clipping_norm)
    assert len(moves) == 200
    assert np.mean(np.array(moves) > 0.99) > 0.5  # most subjects are clipped, so that the bound is met


# ---- the warm start (rule 26)


def release_moments(bench: Bench) -> np.ndarray:
    return site_moments(
        bench.records, config=bench.config, plan=bench.plan, discriminator=bench.discriminator, entropy=bench.entropy
    )


def slow_moments(features: np.ndarray, captions: np.ndarray, subjects: Sequence[np.ndarray]) -> np.ndarray:
    """Outer products of one image after the other, their mean, its clip; features have an even number of cells."""
    side, columns = features.shape[1] // 2, captions.shape[1] + 1
    count = side * side * features.shape[3]
    rho = 2 * 0.33 * np.sqrt(count / columns)
    scale = np.sqrt(2 * 0.33**2 * count + (2 * rho) ** 2)
    total = np.zeros((count + columns) * columns)
    for rows in subjects:
        vectors = []
        for row in rows:
            f = features[row].reshape(side, 2, side, 2, -1).mean(axis=(1, 3)).transpose(2, 0, 1).ravel()
            t = np.concatenate([[1.0], captions[row]])
            vectors.append(np.concatenate([np.outer(f, t).ravel(), rho * np.outer(t, t).ravel()]) / scale)
        mean = np.mean(vectors, axis=0)
        total += mean * min(1.0, 1 / np.linalg.norm(mean))
    return total


MEANS, RANDOM = MomentFeatures((4, 4, 3)), MomentFeatures((4, 4, 3), 50)


@pytest.mark.parametrize("part", [2, 1000])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_moments_of_subjects_equal_a_loop_over_single_images(
    scale: float, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "ROWS", part)  # images of a subject are taken in parts
    rng = np.random.default_rng(1)
    features = scale * rng.standard_normal((21, 4, 4, 3))
    captions = rng.standard_normal((21, 5)) / 5**0.5
    subjects = np.split(rng.permutation(21), [1, 3, 6, 10, 15])  # 1 to 6 images each
    got = clipped_subject_moment_sum(torch.tensor(features), torch.tensor(captions), subjects, MEANS).numpy()
    assert np.allclose(got, slow_moments(features, captions, subjects), atol=1e-6)


@pytest.mark.parametrize("of", [MEANS, RANDOM], ids=["means", "random features"])
def test_moments_of_subjects_with_one_image_are_those_of_examples(of: MomentFeatures) -> None:
    features, captions = torch.randn(9, 4, 4, 3), torch.randn(9, 5)
    subjects = [np.array([row]) for row in range(9)]
    assert torch.allclose(
        clipped_subject_moment_sum(features, captions, subjects, of), clipped_moment_sum(features, captions, of),
        atol=1e-6,
    )


@pytest.mark.parametrize("random", [0, 20])
def test_a_whole_subject_moves_the_moments_by_at_most_one(random: int) -> None:
    of = MomentFeatures((2, 2, 3), random)
    rng = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        features = scale * torch.randn(60, 2, 2, 3, generator=rng)
        features[20:40] = -features[:20]  # images that nearly cancel out
        captions = torch.nn.functional.normalize(torch.randn(60, 4, generator=rng), dim=1)
        captions[20:40] = captions[:20]
        subjects = [np.arange(50), np.arange(50, 53), np.arange(53, 60)]
        whole = clipped_subject_moment_sum(features, captions, subjects, of)
        for without in range(3):
            others = subjects[:without] + subjects[without + 1 :]
            assert (whole - clipped_subject_moment_sum(features, captions, others, of)).norm() <= 1 + 1e-9


def test_a_subject_that_is_not_finite_adds_nothing_to_the_moments() -> None:
    features, captions = torch.randn(5, 2, 2, 3), torch.randn(5, 4)
    features[3, 0, 0, 0] = float("nan")
    of = MomentFeatures((2, 2, 3), 20)
    got = clipped_subject_moment_sum(features, captions, [np.array([0, 3]), np.array([1, 2, 4])], of)
    assert torch.equal(got, clipped_subject_moment_sum(features, captions, [np.array([1, 2, 4])], of))


def test_a_sites_moment_release_is_of_subjects() -> None:
    sizes = [1, 4, 2, 30]
    bench = Bench(by_subject(2), data=people(of_sizes(sizes)))
    assert bench.records.features is not None
    expected = slow_moments(
        bench.records.features.double().numpy(), bench.encoder.encode([f"picture {i}" for i in range(37)]).numpy(),
        np.split(np.arange(37), np.cumsum(sizes)[:-1]),
    )  # fmt: skip
    # All 30 images count, though a step would look at two; the lattice of the moments has C = 1.
    lattice = replace(bench.plan, clipping_norm=1.0).lattice
    assert np.allclose(release_moments(bench) * lattice, expected, atol=1e-5)


def test_every_local_step_draws_images_anew() -> None:
    bench = Bench(by_subject(2), data=people(of_sizes([50])))
    keywords = bench.keywords(server_round=1)
    first, second = (
        site_gradient(bench.discriminator, bench.records, local_step=step, **keywords) for step in (0, 1)
    )
    assert not np.array_equal(first, second)
