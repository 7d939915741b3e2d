"""What the server does with released sums: discriminator step, generator steps, moving average. Pure torch.

It sees what sites released (sums, moments) and public prompts only, so everything here is post-processing and
costs no privacy.
Not here: who is asked, what is charged, what is written.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.moment_matching import MomentMatching
from shared.adversarial import UPDATE_LATTICE, build_loss, fakes_gradient, real_record_loss, take_step, to_bytes
from shared.config import RunConfig
from shared.errors import ConfigError
from shared.fakes import FakeBank
from shared.models import (
    build_discriminator,
    build_generator,
    draw_latents,
    flat_parameters,
    load_flat_parameters,
    weights_digest,
)
from shared.moments import CLIPPING_NORM as MOMENT_NORM
from shared.moments import MomentFit, moment_features, moment_size
from shared.optimizers import build_optimizer, load_optimizer_state, optimizer_state, set_learning_rate
from shared.privacy.plan import PrivacyPlan
from shared.prompts import PromptPool
from shared.text import CaptionEncoder, build_encoder

# Generator steps a round, from "the discriminator needs many rounds" up; whole numbers follow.
SLOW_RUNGS = (1 / 200, 1 / 100, 1 / 50, 1 / 20, 1 / 10, 1 / 5, 1 / 2)
ACCURACY_DECAY = 0.9  # of the moving average of the accuracy on fresh fakes
SAMPLE_ROWS = 128  # pictures drawn in one pass
# Of the discriminator's warm start: prompts, pictures of each, and rows of a step.
WARM_PROMPTS, WARM_VIEWS, WARM_ROWS = 128, 16, 256
WARM_MOMENT_WEIGHT = 10.0  # against the mode-seeking term, where there is one
WARM_WRONG_PROMPT_WEIGHT = 1.0  # captions are what the moments are about


@dataclass(frozen=True)
class _FakeBatch:
    """Fakes of one generator step, with the graph that leads back to the generator.

    Attributes:
        features: `(F, h, w, c)`.
        conditioning: `(F, E)`.
        latents: `(F, Z)`.
    """

    features: Tensor
    conditioning: Tensor
    latents: Tensor


class ServerTraining:
    """Discriminator, generator, their optimizers, and the ladder that balances them."""

    def __init__(self, config: RunConfig, plan: PrivacyPlan, prompts: PromptPool, encoder: CaptionEncoder) -> None:
        self.config, self.plan, self.prompts, self.encoder = config, plan, prompts, encoder
        self.device = torch.device(config.compute.device)
        self.prompt_embeddings = encoder.encode(prompts.texts).to(self.device)  # (P, E)
        self.loss = build_loss(config.discriminator)
        self.discriminator = build_discriminator(config, embedding_dim=encoder.dim)
        self.generator = build_generator(config, embedding_dim=encoder.dim)
        self.moment_features = moment_features(config, self.discriminator.feature_shape)
        self.matching: MomentMatching | None = None  # from the warm start on
        self.ema_generator = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.discriminator_optimizer = build_optimizer(self.discriminator, config.discriminator_optimizer)
        self.generator_optimizer = build_optimizer(self.generator, config.generator_optimizer)
        self.ladder = (*SLOW_RUNGS, *range(1, config.training.max_generator_steps + 1))
        self.first_rung = self.ladder.index(
            min(config.training.generator_steps, config.training.max_generator_steps)
        )
        self.rung = self.first_rung
        self.generator_steps = 0
        self.steps_on_rung = 0
        self.credit = 0.0  # generator steps that are due, below one
        # Half-way between the thresholds, or the first rounds would move the ladder without any evidence.
        self.accuracy = self.middle_accuracy = (config.training.low_accuracy + config.training.high_accuracy) / 2

    def warm_start(
        self, moments: np.ndarray, replies: int, on_step: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Pre-trains both models: the generator until its mean features at each prompt are the released ones.

        Args:
            moments: `(moment_size,)` int64, summed over `replies` sites, in units of the moment plan's lattice.
            on_step: called after each of the generator's steps with its number and how many there are.
        """
        sigma = self.plan.warm_start_noise_multiplier or 0.0
        plan = replace(self.plan, noise_multiplier=sigma, clipping_norm=MOMENT_NORM)
        noise_std = plan.noise_multiplier * plan.sensitivity(len(moments)) * replies**0.5
        fit = MomentFit.of_sum(
            moments * plan.lattice, features=self.moment_features.size, embedding_dim=self.encoder.dim,
            noise_std=noise_std,
        )  # fmt: skip
        self.matching = MomentMatching(self.moment_features, fit, self.prompt_embeddings)
        steps = self.config.warm_start.steps
        for step in range(steps):
            set_learning_rate(self.generator_optimizer, self.config.generator_optimizer, step + 1, steps)
            batch = self._generator_batch("warm-start", step)
            loss = WARM_MOMENT_WEIGHT * self.matching.loss(batch.features, batch.conditioning)
            self._generator_step(loss + self._variety_loss(batch))
            if on_step is not None:
                on_step(step + 1, steps)
        return {
            "moment_directions": float(fit.directions_kept),
            "warm_start_distance": self.matching.distance,
            "warm_start_discriminator_loss": self._teach_discriminator(fit),
        }

    def _teach_discriminator(self, fit: MomentFit) -> float:
        """The discriminator learns what the moments say of captions, before the first real row.

        The generator's features, moved to the mean that the moments ask for, stand for real ones; the same unmoved
        are the fakes. It then tells most real pictures' captions from other prompts, which costs the first
        rounds otherwise.
        """
        steps = self.config.warm_start.discriminator_steps
        if steps == 0:
            return float("nan")
        rng = self._rng("warm-start-discriminator")
        chosen = rng.permutation(len(self.prompts))[:WARM_PROMPTS]
        picks = torch.from_numpy(np.repeat(chosen, WARM_VIEWS)).to(self.device)
        conditioning, latents = self.prompt_embeddings[picks], self._latents(len(picks), rng)
        with torch.no_grad():
            fakes = torch.cat(
                [
                    self.discriminator.features(self.generator(z, e))
                    for z, e in zip(latents.split(SAMPLE_ROWS), conditioning.split(SAMPLE_ROWS), strict=True)
                ]
            )  # (N, h, w, c)
            of = self.moment_features
            means = of.averaged(fakes).view(len(chosen), WARM_VIEWS, -1).mean(dim=1)
            expected = fit.expected_features(self.prompt_embeddings[torch.from_numpy(chosen).to(self.device)])
            reals = fakes + of.unaveraged(expected[:, : of.pooled] - means).repeat_interleave(WARM_VIEWS, dim=0)
        # A single prompt has no other that would be wrong.
        weight = WARM_WRONG_PROMPT_WEIGHT if len(self.prompts) > 1 else 0.0
        of_records = real_record_loss(self.loss, wrong_prompt_weight=weight)
        optimizer = build_optimizer(self.discriminator, self.config.discriminator_optimizer)
        parameters = [p for _, p in sorted(self.discriminator.named_parameters())]
        loss = torch.zeros(())
        self.discriminator.requires_grad_(True)
        for step in range(steps):
            set_learning_rate(optimizer, self.config.discriminator_optimizer, step + 1, steps)
            rows = torch.from_numpy(rng.integers(len(picks), size=WARM_ROWS)).to(self.device)
            others = rng.integers(max(1, len(self.prompts) - 1), size=WARM_ROWS)
            others += others >= picks[rows].cpu().numpy()  # any prompt but the row's own
            wrong = self.prompt_embeddings[torch.from_numpy(others % len(self.prompts)).to(self.device)]
            logits = self.discriminator(reals[rows][:, None], torch.stack([conditioning[rows], wrong], dim=1))
            shown = rows[: WARM_ROWS // 2]
            of_fakes = self.discriminator(fakes[shown][:, None], conditioning[shown][:, None])
            loss = of_records(logits).mean() + self.loss.fake(of_fakes).mean()
            gradients = torch.autograd.grad(loss, parameters)
            take_step(self.discriminator, optimizer, torch.cat([g.reshape(-1) for g in gradients]))
        self.discriminator.requires_grad_(False)
        return float(loss.detach())

    def moment_size(self) -> int:
        return moment_size(self.moment_features.size, self.encoder.dim)

    def fake_bank(self, server_round: int) -> FakeBank:
        """Fakes for sites that take several local steps: `training.fakes` for each of them."""
        count = self.config.training.fakes * self.config.federation.local_steps
        images, picks = self._fakes(count, "bank", server_round)
        return FakeBank(to_bytes(images), picks.to(torch.int32).cpu().numpy())

    def step(self, total: np.ndarray, replies: int, server_round: int) -> dict[str, float]:
        """One round: the discriminator's step from the released sum, then the generator's steps that are due.

        Args:
            total: `(num_parameters,)` int64, the sum of all replies, in the lattice of what sites send.
            replies: how many sites it holds.
        Returns:
            Public figures for the log of the run.
        """
        config = self.config
        if server_round > config.training.lead_rounds:
            self.credit += self.ladder[self.rung]
        due = int(self.credit + 1e-9)
        self.credit -= due
        # The first generator step goes on from fakes that the discriminator's step has already made.
        batch = self._generator_batch(server_round, 0) if due else None
        of_fakes = fakes_gradient(
            self.discriminator, *self._shown_fakes(batch, server_round), self.loss,
            clipping_norm=self.plan.clipping_norm,
        )  # fmt: skip
        accuracy = (of_fakes.logits < 0).float().mean().item()
        self.accuracy = ACCURACY_DECAY * self.accuracy + (1 - ACCURACY_DECAY) * accuracy
        if config.federation.local_steps == 1:
            # Divide by the expected size of the sites that answered, never by a count of records.
            divisor = self.plan.expected_batch_size * replies / self.plan.sites
            gradient = torch.from_numpy(total).to(of_fakes.total) * (self.plan.lattice / divisor)
            gradient += of_fakes.total / len(of_fakes.norms)
            set_learning_rate(
                self.discriminator_optimizer, config.discriminator_optimizer, server_round, config.federation.rounds
            )
            take_step(self.discriminator, self.discriminator_optimizer, gradient)
        else:
            update = total * (UPDATE_LATTICE / replies)
            load_flat_parameters(self.discriminator, flat_parameters(self.discriminator) + update)
        set_learning_rate(self.generator_optimizer, config.generator_optimizer, server_round, config.federation.rounds)
        losses: list[float] = []
        while batch is not None:
            losses.append(self._adversarial_step(batch))
            batch = self._generator_batch(server_round, len(losses)) if len(losses) < due else None
        self._move_on_ladder(len(losses))
        return {
            "fakes_accuracy": self.accuracy,
            "fakes_loss": float(self.loss.fake(of_fakes.logits).mean()),
            "generator_loss": float(np.mean(losses)) if losses else float("nan"),
            "generator_steps": float(self.generator_steps),
            "generator_steps_per_round": float(self.ladder[self.rung]),
        }

    def samples(self, prompts: Sequence[str], *, seed: int, indices: Sequence[int]) -> np.ndarray:
        """Pictures of the EMA generator, `(N, H, W, C)` uint8: prompt i with the latents of (seed, indices[i])."""
        embeddings = self.encoder.encode(list(prompts)).to(self.device)
        return sample(self.ema_generator, embeddings, seed=seed, indices=indices)

    @property
    def digest(self) -> str:
        """SHA-256 of the final weights: EMA generator, then discriminator."""
        return weights_digest(self.ema_generator, self.discriminator)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; draws are keyed by round, so no random state is among it."""
        return {
            "discriminator": dict(self.discriminator.named_parameters()),
            "generator": dict(self.generator.named_parameters()),
            "ema_generator": dict(self.ema_generator.named_parameters()),
            "discriminator_optimizer": optimizer_state(self.discriminator_optimizer),
            "generator_optimizer": optimizer_state(self.generator_optimizer),
            "rung": self.rung,
            "generator_steps": self.generator_steps,
            "steps_on_rung": self.steps_on_rung,
            "credit": self.credit,
            "accuracy": self.accuracy,
            "matching": {} if self.matching is None else self.matching.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("discriminator", "generator", "ema_generator"):
            with torch.no_grad():
                for key, parameter in getattr(self, name).named_parameters():
                    parameter.copy_(state[name][key])
        load_optimizer_state(self.discriminator_optimizer, state["discriminator_optimizer"])
        load_optimizer_state(self.generator_optimizer, state["generator_optimizer"])
        self.rung, self.generator_steps = int(state["rung"]), int(state["generator_steps"])
        self.steps_on_rung = int(state["steps_on_rung"])
        self.credit, self.accuracy = float(state["credit"]), float(state["accuracy"])
        if state["matching"]:
            fit = MomentFit(**state["matching"]["fit"])
            self.matching = MomentMatching(self.moment_features, fit, self.prompt_embeddings)
            self.matching.load_state_dict(state["matching"])

    def _generator_batch(self, when: int | str, step: int) -> _FakeBatch:
        settings = self.config.training
        rng = self._rng("generator", when, step)
        picks = self._draw_prompts(settings.generator_batch, rng)
        if settings.mode_seeking_weight:
            half = settings.generator_batch // 2
            picks = torch.cat([picks[:half], picks[:half]])  # pairs with one prompt
        latents = self._latents(len(picks), rng)
        conditioning = self.prompt_embeddings[picks]
        return _FakeBatch(self.discriminator.features(self.generator(latents, conditioning)), conditioning, latents)

    def _shown_fakes(self, batch: _FakeBatch | None, server_round: int) -> tuple[Tensor, Tensor]:
        """`training.fakes` fakes for the discriminator's step: of the generator's batch, others where that is short."""
        count = self.config.training.fakes
        features, conditioning = [], []
        if batch is not None:
            features.append(batch.features.detach()[:count])
            conditioning.append(batch.conditioning[:count])
            count -= len(features[0])
        if count:
            images, picks = self._fakes(count, "fakes", server_round)
            with torch.no_grad():
                features.append(self.discriminator.features(images))
            conditioning.append(self.prompt_embeddings[picks])
        return torch.cat(features), torch.cat(conditioning)

    def _adversarial_step(self, batch: _FakeBatch) -> float:
        settings = self.config.training
        logits = self.discriminator(batch.features[:, None], batch.conditioning[:, None])
        loss = self.loss.generator(logits).mean() + self._variety_loss(batch)
        if self.matching is not None and settings.moment_weight:
            loss = loss + settings.moment_weight * self.matching.loss(batch.features, batch.conditioning)
        self._generator_step(loss)
        return float(loss.detach())

    def _variety_loss(self, batch: _FakeBatch) -> Tensor:
        settings = self.config.training
        if not settings.mode_seeking_weight:
            return torch.zeros((), device=self.device)
        variety = _variety(*batch.features.chunk(2), *batch.latents.chunk(2), cap=settings.mode_seeking_cap)
        return -settings.mode_seeking_weight * variety

    def _generator_step(self, loss: Tensor) -> None:
        parameters = [p for _, p in sorted(self.generator.named_parameters())]
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.generator_optimizer.step()
        self.generator_steps += 1
        decay = min(self.config.training.ema_decay, (1 + self.generator_steps) / (10 + self.generator_steps))
        with torch.no_grad():
            for average, current in zip(self.ema_generator.parameters(), self.generator.parameters(), strict=True):
                average.lerp_(current, 1 - decay)

    def _move_on_ladder(self, generator_steps: int) -> None:
        """From the accuracy on fresh fakes alone: it costs nothing (DESIGN: few G steps while D is lost)."""
        settings = self.config.training
        self.steps_on_rung += generator_steps
        if not settings.adaptive or self.steps_on_rung < settings.grace:
            return
        # Away from the first rung at the thresholds, back to it once the accuracy is half-way between them again.
        lower = settings.low_accuracy if self.rung <= self.first_rung else self.middle_accuracy
        upper = settings.high_accuracy if self.rung >= self.first_rung else self.middle_accuracy
        if self.accuracy < lower and self.rung > 0:
            self.rung, self.steps_on_rung = self.rung - 1, 0
        elif self.accuracy > upper and self.rung < len(self.ladder) - 1:
            self.rung, self.steps_on_rung = self.rung + 1, 0

    def _fakes(self, count: int, purpose: str, server_round: int) -> tuple[Tensor, Tensor]:
        rng = self._rng(purpose, server_round)
        picks = self._draw_prompts(count, rng)
        with torch.no_grad():
            parts = [
                self.generator(latents, self.prompt_embeddings[part])
                for latents, part in zip(
                    self._latents(count, rng).split(SAMPLE_ROWS), picks.split(SAMPLE_ROWS), strict=True
                )
            ]
        return torch.cat(parts), picks

    def _draw_prompts(self, count: int, rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(rng.integers(len(self.prompts), size=count)).to(self.device)

    def _latents(self, count: int, rng: np.random.Generator) -> Tensor:
        values = rng.standard_normal((count, self.generator.latent_dim), dtype=np.float32)
        return torch.from_numpy(values).to(self.device)

    def _rng(self, *labels: int | str) -> np.random.Generator:
        """Keyed by the run's seed and the round, so that a resumed run repeats the draw."""
        text = "|".join(str(label) for label in (self.config.seed, *labels))
        key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8")
        return np.random.Generator(np.random.Philox(key=key))


def sample(generator: torch.nn.Module, embeddings: Tensor, *, seed: int, indices: Sequence[int]) -> np.ndarray:
    """`(N, H, W, C)` uint8 of prompt embeddings `(N, E)` with the latents of (seed, index)."""
    latents = draw_latents(seed, indices, generator.latent_dim).to(embeddings.device)  # type: ignore[arg-type]
    with torch.no_grad():
        parts = [
            to_bytes(generator(z, e))
            for z, e in zip(latents.split(SAMPLE_ROWS), embeddings.split(SAMPLE_ROWS), strict=True)
        ]
    return np.concatenate(parts)


def _variety(first: Tensor, second: Tensor, latents: Tensor, other_latents: Tensor, *, cap: float) -> Tensor:
    """Distance of features over distance of latents for pairs with one prompt, capped where it suffices.

    Source: Mao et al. 2019, "Mode Seeking GANs", https://arxiv.org/abs/1903.05628.
    """
    apart = (first - second).abs().flatten(1).mean(dim=1)
    return (apart / (latents - other_latents).abs().mean(dim=1)).clamp(max=cap).mean()


def check_buildable(config: RunConfig) -> None:
    """Everything that settings name exists and fits together: better said now than in the first round.

    Raises:
        ConfigError: it does not.
    """
    if config.compute.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for and there is none here", hint="--device cpu")
    encoder = build_encoder(config.text)
    build_loss(config.discriminator)
    build_optimizer(build_discriminator(config, embedding_dim=encoder.dim), config.discriminator_optimizer)
    build_optimizer(build_generator(config, embedding_dim=encoder.dim), config.generator_optimizer)
