"""The local phase at a site and the server's side of a round, without Flower (PRIVACY rules 1, 2, 6, 7, 14, 26)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from client.training import PrivateRecords, draw_batch, prepare_records, site_gradient, site_moments, site_update
from server.training import ServerTraining
from shared.adversarial import UPDATE_LATTICE, to_unit_range
from shared.config import RunConfig
from shared.data import ImageCaptionDataset
from shared.models import build_discriminator, flat_parameters, load_flat_parameters
from shared.moments import MomentFeatures, MomentFit, clipped_moment_sum, moment_size
from shared.privacy.entropy import SeededEntropy
from shared.privacy.plan import PrivacyPlan, make_plan
from shared.prompts import PromptPool
from shared.text import build_encoder

PROMPTS = PromptPool(("a red square", "a blue square", "a red circle", "a blue circle"))
PLAIN, RANDOM = MomentFeatures((2, 2, 3)), MomentFeatures((2, 2, 3), random=20)


def settings(**changes: Any) -> RunConfig:
    flat = {
        "privacy.delta": 1e-4, "privacy.sampling-rate": 0.25, "privacy.clipping-norm": 1.0,
        "federation.published-records": 80, "federation.sites": 2, "federation.rounds": 4,
        "data.image-size": 8, "text.dim": 16,
        "discriminator.name": "toy", "discriminator.width": 4, "discriminator.hidden": 8,
        "generator.width": 4, "generator.latent-dim": 4, "training.fakes": 16, "training.generator-batch": 16,
        "training.lead-rounds": 0, "discriminator-optimizer.learning-rate": 2e-3,
    }  # fmt: skip
    return RunConfig.from_flat({**flat, **changes})


def dataset(count: int = 40, *, captions: Sequence[str] = PROMPTS.texts, seed: int = 0) -> ImageCaptionDataset:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, size=(count, 8, 8, 3), dtype=np.uint8)
    return ImageCaptionDataset(images=images, captions=[(captions[i % len(captions)],) for i in range(count)])


def two_colours(captions: Sequence[str]) -> ImageCaptionDataset:
    """64 flat pictures, the even ones red, the odd ones blue."""
    images = np.zeros((64, 8, 8, 3), dtype=np.uint8)
    images[::2, :, :, 0] = 255
    images[1::2, :, :, 2] = 255
    return ImageCaptionDataset(images=images, captions=[(captions[i % 2],) for i in range(64)])


def assert_two_colours(server: ServerTraining, captions: Sequence[str]) -> None:
    red, blue = server.samples(captions, seed=0, indices=[0, 1]).astype(float).mean(axis=(1, 2))
    assert red[0] > 1.5 * red[2]
    assert blue[2] > 1.5 * blue[0]


class Bench:
    """One site and the server of a small run, with the pieces that tests change."""

    def __init__(self, config: RunConfig, *, data: ImageCaptionDataset | None = None) -> None:
        self.config = config
        self.plan = make_plan(config)
        self.encoder = build_encoder(config.text)
        self.discriminator = build_discriminator(config, embedding_dim=self.encoder.dim)
        self.prompt_embeddings = self.encoder.encode(PROMPTS.texts)
        self.records = self.prepare(data or dataset())
        self.entropy = SeededEntropy(3, "site-00")

    def prepare(self, data: ImageCaptionDataset) -> PrivateRecords:
        return prepare_records(
            data, np.arange(len(data)), config=self.config, encoder=self.encoder, discriminator=self.discriminator
        )

    def keywords(self, **changes: Any) -> dict[str, Any]:
        return {
            "config": self.config, "plan": self.plan, "prompts": PROMPTS, "entropy": self.entropy,
            "prompt_embeddings": self.prompt_embeddings, **changes,
        }  # fmt: skip

    def gradient(self, server_round: int = 1, **changes: Any) -> np.ndarray:
        return site_gradient(self.discriminator, self.records, server_round=server_round, **self.keywords(**changes))


def noiseless(plan: PrivacyPlan) -> PrivacyPlan:
    return replace(plan, private=False, noise_multiplier=0.0)


def test_a_reply_is_integers_of_the_length_that_the_public_model_gives() -> None:
    bench = Bench(settings())
    reply = bench.gradient()
    assert reply.dtype == np.int64
    assert reply.shape == (sum(p.numel() for p in bench.discriminator.parameters()),)


def test_two_sites_of_different_size_reply_at_equal_length() -> None:
    bench = Bench(settings())
    small = bench.gradient()
    bench.records = bench.prepare(dataset(7))
    assert bench.gradient().shape == small.shape


def test_an_empty_draw_is_pure_noise() -> None:
    bench = Bench(settings())
    bench.records = bench.prepare(dataset(1))
    plan = replace(bench.plan, sampling_rate=0.0)
    units = bench.gradient(plan=plan)
    std = plan.noise_multiplier * plan.sensitivity(len(units)) / plan.lattice
    # chi-square of n = 1,217 normals: |z| < 5 fails a right implementation in 6e-7 of draws.
    z = ((units / std) ** 2 - 1).sum() / (2 * len(units)) ** 0.5
    assert abs(z) < 5
    assert not bench.gradient(plan=noiseless(plan)).any()


def test_the_noise_of_each_parameter_tensor_has_the_planned_size() -> None:
    bench = Bench(settings())
    with_noise = bench.gradient().astype(float)
    without = bench.gradient(plan=noiseless(bench.plan)).astype(float)
    std = bench.plan.noise_multiplier * bench.plan.sensitivity(len(without)) / bench.plan.lattice
    noise, offset = (with_noise - without) / std, 0
    for _, parameter in sorted(bench.discriminator.named_parameters()):
        part = noise[offset : offset + parameter.numel()]
        offset += parameter.numel()
        if len(part) >= 30:
            # |z| < 5.5 of a chi-square near its normal limit, at most 7 tensors: false alarm below 1e-5.
            assert abs((part**2 - 1).sum() / (2 * len(part)) ** 0.5) < 5.5


def test_a_draw_depends_on_the_round_and_the_step_but_not_on_the_thread() -> None:
    bench = Bench(settings())
    assert np.array_equal(bench.gradient(1), bench.gradient(1))
    assert not np.array_equal(bench.gradient(1), bench.gradient(2))


def test_a_record_moves_the_whole_reply_by_at_most_its_clip() -> None:
    bench = Bench(settings(**{"privacy.sampling-rate": 1.0, "privacy.clipping-norm": 0.1}))
    plan = noiseless(bench.plan)
    whole = bench.gradient(plan=plan)
    for seed in range(20):
        images = bench.records.images.copy()
        images[5] = np.random.default_rng(seed).integers(0, 256, size=images[5].shape)
        changed = replace(dataset(), images=images)
        records, bench.records = bench.records, bench.prepare(changed)
        moved = np.linalg.norm((bench.gradient(plan=plan) - whole) * plan.lattice)
        bench.records = records
        # One record replaced is one removed and one added: at most twice the sensitivity.
        assert 0 < moved <= 2 * plan.sensitivity(len(whole))


def test_a_wrong_prompt_is_public_and_never_the_records_own_caption() -> None:
    bench = Bench(settings(**{"privacy.sampling-rate": 1.0}))
    for server_round in range(1, 20):
        batch = draw_batch(bench.discriminator, bench.records, labels=(server_round, 0), **bench.keywords())
        for caption, wrong in zip(batch.captions, batch.wrong_prompts, strict=True):
            matches = (bench.prompt_embeddings == wrong).all(dim=1)
            assert matches.any()
            assert not torch.equal(caption, wrong)


def test_every_other_public_prompt_is_drawn_as_wrong_equally_often() -> None:
    bench = Bench(settings(**{"privacy.sampling-rate": 1.0}), data=dataset(3000, captions=["a red square"]))
    batch = draw_batch(bench.discriminator, bench.records, labels=(1, 0), **bench.keywords())
    counts = [int((batch.wrong_prompts == e).all(dim=-1).sum()) for e in bench.prompt_embeddings]
    assert counts[0] == 0
    # Binomial(3000, 1/3): 1000 +- 5 deviations of 25.8; false alarm below 2e-6.
    assert all(abs(count - 1000) < 130 for count in counts[1:])


def test_a_near_wrong_prompt_is_among_those_nearest_to_the_caption() -> None:
    config = settings(
        **{"privacy.sampling-rate": 1.0, "discriminator.near-prompt-share": 1.0, "discriminator.near-prompts": 2}
    )
    bench = Bench(config, data=dataset(200, captions=["a red square"]))
    batch = draw_batch(bench.discriminator, bench.records, labels=(1, 0), **bench.keywords())
    likeness = {text: float(bench.prompt_embeddings[0] @ e) for text, e in
                zip(PROMPTS.texts[1:], bench.prompt_embeddings[1:], strict=True)}  # fmt: skip
    allowed = sorted(likeness, key=likeness.__getitem__)[-2:]
    places = [PROMPTS.texts.index(text) for text in allowed]
    counts = [int((batch.wrong_prompts == bench.prompt_embeddings[place]).all(dim=-1).sum()) for place in places]
    assert sum(counts) == 200
    assert min(counts) > 50


def test_views_of_a_record_stay_with_it() -> None:
    bench = Bench(settings(**{"data.views": 3, "data.rotation": 20.0, "data.brightness": 0.2}))
    assert bench.records.features is None
    batch = draw_batch(bench.discriminator, bench.records, labels=(1, 0), **bench.keywords())
    assert batch.features.shape[1:] == (3, *bench.discriminator.feature_shape)
    assert not torch.equal(batch.features[:, 0], batch.features[:, 1])


def test_a_record_with_several_captions_is_one_record() -> None:
    data = dataset(4)
    data.captions[0] = ("a red square", "eine rote Kachel")
    bench = Bench(settings(**{"privacy.sampling-rate": 1.0}), data=data)
    batch = draw_batch(bench.discriminator, bench.records, labels=(1, 0), **bench.keywords())
    assert len(batch.features) == 4


def test_one_local_step_is_one_step_of_the_optimizer_on_the_noised_sum() -> None:
    """The update of a site, against torch's own Adam on a gradient put together by hand."""
    config = settings(**{"federation.local-steps": 2})
    bench = Bench(config)
    server = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
    fakes = server.fake_bank(1)
    update = site_update(bench.discriminator, bench.records, fakes, server_round=1, **bench.keywords())
    assert update.dtype == np.int64
    assert np.array_equal(
        np.rint((flat_parameters(bench.discriminator).astype(float)
                 - flat_parameters(build_discriminator(config, embedding_dim=16))) / UPDATE_LATTICE),
        update,
    )  # fmt: skip
    # Adam's first steps have size lr: 2e-3 / 10 (first of ten warm-up rounds), two of them at most.
    assert 0 < np.abs(update * UPDATE_LATTICE).max() <= 2 * 2e-4 * 1.5


def test_every_local_step_draws_and_noises_anew() -> None:
    bench = Bench(settings(**{"federation.local-steps": 2}))
    keywords = bench.keywords(server_round=1)
    first = site_gradient(bench.discriminator, bench.records, local_step=0, **keywords)
    second = site_gradient(bench.discriminator, bench.records, local_step=1, **keywords)
    assert not np.array_equal(first, second)


def test_replacing_every_caption_changes_nothing_at_the_server_but_the_message() -> None:
    """Rule 1: given the same noisy message, every server tensor is bit-identical."""
    config = settings()
    bench = Bench(config)
    message = bench.gradient()
    states = []
    for _ in range(2):  # the server has no argument through which captions could come
        server = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
        server.step(message + message, 2, 1)
        states.append(server.digest)
        bench.records = bench.prepare(dataset(captions=["wholly other words", "and more of them"]))
        assert not np.array_equal(bench.gradient(), message)
    assert states[0] == states[1]


def test_the_discriminator_step_divides_by_the_expected_batch() -> None:
    """Against a step put together by hand: plain SGD-like Adam at its first step moves by the sign."""
    config = settings(**{"training.generator-steps": 1})
    bench = Bench(config)
    server = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
    before = flat_parameters(server.discriminator)
    huge = np.full(len(before), 10**9, dtype=np.int64)
    server.step(huge, 2, 1)
    moved = flat_parameters(server.discriminator) - before
    rate = config.discriminator_optimizer.learning_rate / config.discriminator_optimizer.warmup_rounds
    assert np.allclose(moved, -rate, rtol=1e-2)


@pytest.mark.parametrize(("accuracy", "expected"), [(0.0, -1), (1.0, 1), (0.8, 0)])
def test_the_ladder_moves_towards_the_side_that_loses(accuracy: float, expected: int) -> None:
    config = settings(**{"training.grace": 1, "training.low-accuracy": 0.6, "training.high-accuracy": 0.9})
    bench = Bench(config)
    server = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
    rung = server.rung
    server.accuracy = accuracy
    server._move_on_ladder(1)
    assert server.rung - rung == expected


@pytest.mark.parametrize(("away", "stays", "returns"), [(0.5, 0.7, 0.8), (0.95, 0.8, 0.7)])
def test_the_ladder_comes_back_when_neither_side_loses(away: float, stays: float, returns: float) -> None:
    """Once a dip in the first rounds halved the generator's steps for the whole run."""
    config = settings(**{"training.grace": 1, "training.low-accuracy": 0.6, "training.high-accuracy": 0.9})
    bench = Bench(config)
    server = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
    first, rungs = server.rung, []
    for accuracy in (away, stays, returns, returns):
        server.accuracy = accuracy
        server._move_on_ladder(1)
        rungs.append(abs(server.rung - first))
    assert rungs == [1, 1, 0, 0]


def test_the_first_rounds_do_not_move_the_ladder_without_evidence() -> None:
    """The moving average once began at a half, below the threshold, whatever the first fakes showed."""
    config = settings(**{"training.generator-steps": 3})
    bench = Bench(config)
    server = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
    for _ in range(60):
        server.accuracy = 0.9 * server.accuracy + 0.1 * 0.7
        server._move_on_ladder(3)
        assert server.ladder[server.rung] == 3


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_a_warm_start_with_few_prompts_works(prompts: int) -> None:
    pool = PromptPool(PROMPTS.texts[:prompts])
    config = settings(**{"privacy.name": "none", "warm-start.enabled": True, "federation.sites": 1})
    bench = Bench(config)
    server = ServerTraining(config, bench.plan, pool, bench.encoder)
    message = site_moments(
        bench.records, config=config, plan=bench.plan, discriminator=bench.discriminator, entropy=bench.entropy
    )
    figures = server.warm_start(message, 1)
    assert np.isfinite(figures["warm_start_discriminator_loss"])


def test_a_warm_start_of_the_generator_alone_leaves_the_discriminator() -> None:
    config = settings(
        **{"privacy.name": "none", "warm-start.enabled": True, "warm-start.steps": 2,
           "warm-start.discriminator-steps": 0, "federation.sites": 1}
    )  # fmt: skip
    bench = Bench(config)
    server = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
    before = flat_parameters(server.discriminator)
    message = site_moments(
        bench.records, config=config, plan=bench.plan, discriminator=bench.discriminator, entropy=bench.entropy
    )
    assert np.isnan(server.warm_start(message, 1)["warm_start_discriminator_loss"])
    assert (flat_parameters(server.discriminator) == before).all()


def test_a_slow_rung_takes_generator_steps_only_now_and_then() -> None:
    config = settings(**{"training.adaptive": False})
    bench = Bench(config)
    server = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
    server.rung = server.ladder.index(1 / 5)
    message = bench.gradient()
    for server_round in range(1, 11):
        server.step(message, 1, server_round)
    assert server.generator_steps == 2


@pytest.mark.parametrize("name", ["adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("fakes", [8, 16, 40])  # fewer than the generator's batch of 16, as many, more
def test_a_server_that_is_loaded_goes_on_bit_for_bit(name: str, fakes: int) -> None:
    config = settings(
        **{"discriminator-optimizer.name": name, "generator-optimizer.name": name, "training.fakes": fakes,
           "training.mode-seeking-weight": 0.5, "warm-start.enabled": True, "warm-start.steps": 2,
           "warm-start.discriminator-steps": 2, "privacy.target-epsilon": 50.0,
           "warm-start.random-features": 30, "training.moment-weight": 1.0}
    )  # fmt: skip
    bench = Bench(config)
    message = bench.gradient()
    moments = site_moments(
        bench.records, config=config, plan=bench.plan, discriminator=bench.discriminator, entropy=bench.entropy
    )

    def server() -> ServerTraining:
        started = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
        started.warm_start(moments, 1)
        return started

    undisturbed = server()
    for server_round in (1, 2, 3):
        undisturbed.step(message, 2, server_round)
    first = server()
    first.step(message, 2, 1)
    resumed = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
    resumed.load_state_dict(first.state_dict())
    for server_round in (2, 3):
        resumed.step(message, 2, server_round)
    assert resumed.digest == undisturbed.digest


@pytest.mark.parametrize("loss", ["non-saturating", "hinge"])
def test_training_without_noise_teaches_the_generator_a_colour(loss: str) -> None:
    """Red and blue 8 px images, no privacy: after some rounds each prompt's pictures have its colour."""
    captions = ("a red square", "a blue square")
    config = settings(
        **{"privacy.name": "none", "discriminator.loss": loss, "federation.sites": 1, "federation.rounds": 60,
           "federation.published-records": 64, "privacy.sampling-rate": 0.5, "training.mode-seeking-weight": 0.1,
           "generator-optimizer.learning-rate": 5e-3}
    )  # fmt: skip
    bench = Bench(config, data=two_colours(captions))
    prompts = PromptPool(captions)
    server = ServerTraining(config, bench.plan, prompts, bench.encoder)
    embeddings = bench.encoder.encode(prompts.texts)
    for server_round in range(1, 61):
        load_flat_parameters(bench.discriminator, flat_parameters(server.discriminator))
        reply = bench.gradient(server_round, prompts=prompts, prompt_embeddings=embeddings)
        server.step(reply, 1, server_round)
    assert_two_colours(server, captions)


@pytest.mark.parametrize("of", [PLAIN, RANDOM], ids=["means", "random features"])
def test_one_record_moves_the_moments_by_at_most_one(of: MomentFeatures) -> None:
    rng = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        features = scale * torch.randn(5, 2, 2, 3, generator=rng)
        captions = torch.nn.functional.normalize(torch.randn(5, 4, generator=rng), dim=1)
        whole = clipped_moment_sum(features, captions, of)
        assert whole.shape == (moment_size(of.size, 4),)
        moved = (whole - clipped_moment_sum(features[1:], captions[1:], of)).norm()
        assert moved <= 1 + 1e-6


@pytest.mark.parametrize("of", [PLAIN, RANDOM], ids=["means", "random features"])
def test_a_record_that_is_not_finite_adds_nothing_to_the_moments(of: MomentFeatures) -> None:
    features, captions = torch.randn(3, 2, 2, 3), torch.randn(3, 4)
    clean = clipped_moment_sum(features[1:], captions[1:], of)
    for value in (float("nan"), float("inf")):
        features[0, 0, 0, 0] = value
        assert torch.allclose(clipped_moment_sum(features, captions, of), clean)


def test_the_fit_of_exact_moments_is_least_squares() -> None:
    """Without noise the expected features are the linear regression on (1, embedding), by numpy."""
    rng = np.random.default_rng(0)
    captions = rng.standard_normal((400, 4)) / 2
    features = captions @ rng.standard_normal((4, 6)) * 0.1 + rng.standard_normal(6) * 0.1
    features += 0.01 * rng.standard_normal((400, 6))
    total = clipped_moment_sum(
        torch.tensor(features).view(400, 1, 1, 6), torch.tensor(captions), MomentFeatures((1, 1, 6))
    )
    fit = MomentFit.of_sum(total.numpy(), features=6, embedding_dim=4, noise_std=0.0)
    design = np.hstack([np.ones((400, 1)), captions])
    expected = design @ np.linalg.lstsq(design, features, rcond=None)[0]
    got = fit.expected_features(torch.tensor(captions, dtype=torch.float32)).numpy()
    assert np.abs(got - expected).max() < 1e-2


@pytest.mark.parametrize("side", [7, 8])
def test_pooled_features_go_back_to_their_cells(side: int) -> None:
    maps, of = torch.randn(2, side, side, 3), MomentFeatures((side, side, 3))
    again = of.unaveraged(of.averaged(maps))
    assert again.shape == maps.shape
    assert torch.allclose(again[:, 0, 0], maps[:, :2, :2].mean(dim=(1, 2)), atol=1e-6)
    if side == 8:  # windows do not overlap there: what went back pools to what it was
        assert torch.allclose(of.averaged(again), of.averaged(maps), atol=1e-6)


def test_the_servers_warm_start_needs_only_the_message() -> None:
    config = settings(**{"warm-start.enabled": True, "warm-start.steps": 5, "privacy.target-epsilon": 50.0})
    bench = Bench(config)
    message = site_moments(
        bench.records, config=config, plan=bench.plan, discriminator=bench.discriminator, entropy=bench.entropy
    )
    assert message.dtype == np.int64
    digests = set()
    for _ in range(2):
        server = ServerTraining(config, bench.plan, PROMPTS, bench.encoder)
        assert server.moment_size() == len(message)
        before = server.digest
        server.warm_start(message, 1)
        assert server.digest != before
        digests.add(server.digest)
    assert len(digests) == 1


@pytest.mark.parametrize("random", [0, 300])
def test_a_warm_start_alone_teaches_both_models_a_colour(random: int) -> None:
    """Once its learning rate was negative after the first step, and it left the generator worse than random."""
    captions = ("a red square", "a blue square")
    config = settings(
        **{"privacy.name": "none", "warm-start.enabled": True, "warm-start.steps": 60, "federation.sites": 1,
           "warm-start.random-features": random, "generator-optimizer.learning-rate": 5e-3}
    )  # fmt: skip
    bench = Bench(config, data=two_colours(captions))
    server = ServerTraining(config, bench.plan, PromptPool(captions), bench.encoder)
    message = site_moments(
        bench.records, config=config, plan=bench.plan, discriminator=bench.discriminator, entropy=bench.entropy
    )
    server.warm_start(message, 1)
    assert_two_colours(server, captions)
    # The discriminator has seen no real picture, and tells which caption belongs to one.
    features = server.discriminator.features(to_unit_range(two_colours(captions).images))[:, None]
    own = server.prompt_embeddings[[row % 2 for row in range(64)]]
    other = server.prompt_embeddings[[1 - row % 2 for row in range(64)]]
    matched, wrong = server.discriminator(features, torch.stack([own, other], dim=1))[:, 0].unbind(dim=1)
    assert (matched > wrong).all()
