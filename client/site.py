"""A site: its own settings, its data opened once, and whether and how it answers an instruction.

What decides is the instruction and the site's own files (policy, ledger, what a person approved), never the records:
everything that depends on them, or on what is left of the budget, ends in one code, `RefusalCode.SITE`, and the
reason goes to the site's own log.

    admit      settings and their digest, place in the run, policy, approval, price; no record is read before this
    reserve    a new run whole, in the ledger; then each release is charged, on disk, before training
    commit     the reply is kept, noted in the ledger, and only then handed over
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor

from client.account import KeptReply, ProposedRun, SiteAccount
from client.gate import Release, SealedRelease, build
from client.membership import open_channel, question_of
from client.policy import SitePolicy
from client.settings import OVERFLOW_SHARE, RELEASE_CODE, SETTINGS, SiteConfig, SiteRefusal, log
from client.training import (
    PrivateRecords,
    StepFigures,
    load_weights,
    prepare_records,
    site_gradient,
    site_moments,
    site_update,
)
from shared.adversarial import build_loss
from shared.config import RunConfig
from shared.data import open_dataset
from shared.errors import (
    BudgetExhausted,
    ConfigError,
    DataError,
    FedCanvasError,
    LedgerError,
    PrivacyError,
    PromptError,
)
from shared.models import Discriminator, build_discriminator, parameter_count
from shared.moments import moment_features, moment_size
from shared.optimizers import OPTIMIZERS
from shared.privacy.budget import Price, fits, price_run
from shared.privacy.entropy import Entropy, SeededEntropy, SystemEntropy
from shared.privacy.ledger import RunAccount, RunTerms
from shared.privacy.plan import PrivacyPlan, make_plan
from shared.prompts import PromptPool
from shared.protection.federation import AggregatorKeys
from shared.records import RefusalCode, RoundInstruction, SiteReply, unpack_envelope
from shared.text import CaptionEncoder, build_encoder

MOST_PENDING = 100  # proposed runs that wait for a person; a server may think of new names for ever


@dataclass(frozen=True, eq=False)
class PublicSide:
    """What a run's instructions share and every site has alike: nothing here depends on a record."""

    config: RunConfig
    plan: PrivacyPlan
    prompts: PromptPool
    prompt_embeddings: Tensor  # (P, E)
    encoder: CaptionEncoder
    discriminator: Discriminator


class Site:
    """One site. `open_site` keeps it for the life of the process, so that its data are opened once."""

    def __init__(self, folder: Path, *, simulated: bool, entropy: Entropy | None = None) -> None:
        """`entropy` is for tests; without it a deployed site draws from the operating system.

        Raises:
            ConfigError: the settings are wrong, or seeded at a deployed site, or unseeded in a simulation.
        """
        self.folder, self.simulated = folder, simulated
        self.config = SiteConfig.read(folder)
        seed = self.config.simulated_seed
        if entropy is None and (seed is not None) != simulated:
            # Neither can be opened as the other: no message makes a deployed site draw what others can predict.
            raise ConfigError(
                f"{folder} is {'a simulated' if seed is not None else 'a deployed'} site and was opened as the other",
                hint="simulated-seed belongs to simulations, and only there",
            )
        if seed is None and self.config.published_records is None:
            raise ConfigError(
                f"{folder / SETTINGS}: 'published-records' is missing",
                hint="how many records the site says it has, rounded up: the work of a step is padded by it",
            )
        if seed is None and not __debug__:
            raise ConfigError("a deployed site does not run without assertions", hint="start Python without -O")
        self.entropy = entropy or (SystemEntropy() if seed is None else SeededEntropy(seed, self.site_id))
        self.account = SiteAccount(folder, store=folder / self.config.store, lineage=self.config.lineage)
        if self.account.ledger.lineage.simulated and not simulated:
            raise ConfigError(f"lineage '{self.config.lineage}' is simulated, and {folder} is a deployed site")
        self.channel = None if simulated else open_channel(folder, self.site_id)
        self._lock = threading.Lock()
        self._public: PublicSide | None = None
        self._records: PrivateRecords | None = None

    @property
    def site_id(self) -> str:
        return self.config.site_id

    def answer(self, instruction: RoundInstruction, *, keys: AggregatorKeys | None = None) -> SiteReply:
        """The one reply to `instruction`; one at a time.

        Args:
            keys: that it was signed with, as `channel` checked; none where the site belongs to no federation.
        Raises:
            SiteRefusal: with the code that may leave the site.
        """
        assert (keys is None) == (self.channel is None)
        with self._lock:
            config = admit(instruction)
            torch.set_num_threads(config.compute.site_threads)  # of this thread: they are part of the result's bits
            try:
                with self.account.locked():
                    return self._answer(instruction, config, keys)
            except FedCanvasError as error:
                raise SiteRefusal(RefusalCode.SITE, f"{error.message} ({error.hint or 'no hint'})") from error

    def _answer(
        self, instruction: RoundInstruction, config: RunConfig, keys: AggregatorKeys | None
    ) -> SiteReply:  # fmt: skip
        began = time.monotonic()
        account, run_id = self.account, instruction.run_id
        run = account.ledger.runs.get(run_id)
        self._check_shown_head(instruction, run)
        if run is not None and (run.terms.config_digest, run.terms.prompts_digest) != (
            instruction.config_digest, instruction.prompts_digest,
        ):  # fmt: skip
            raise SiteRefusal(RefusalCode.CONFIG, f"run {run_id} began with other settings or prompts")
        policy = SitePolicy.read(self.folder)
        if run is not None and run.terms.code_digest != RELEASE_CODE and not self.simulated:
            raise SiteRefusal(RefusalCode.RELEASE, f"run {run_id} began with the code {run.terms.code_digest}")
        if policy.code and RELEASE_CODE not in policy.code:
            raise SiteRefusal(RefusalCode.RELEASE, f"the policy does not allow the installed code {RELEASE_CODE}")
        plan = None if run is None else run.terms.plan
        units, signed_with = self.config.published_records, None if keys is None else keys.fingerprint
        violations = list(policy.violations(config, plan, units=units, signed_with=signed_with))
        if plan is None and not violations:
            # Only now: the plan of a run that the policy forbids (a million rounds) may take hours to compute.
            plan = _plan(config)
            violations = list(policy.violations(config, plan, units=units, signed_with=signed_with))
        if plan is None or violations:
            raise SiteRefusal(RefusalCode.POLICY, f"run {run_id} of {config.federation.name}: {'; '.join(violations)}")
        public = self._open_public(instruction, config, plan)
        parameters = parameter_count(public.discriminator)
        if instruction.weights.shape != (parameters,):
            raise SiteRefusal(RefusalCode.MESSAGE, f"{len(instruction.weights)} weights do not fit the model")
        if parameters > policy.max_parameters:
            raise SiteRefusal(RefusalCode.POLICY, f"{parameters} parameters are more than {policy.max_parameters}")
        if run is None:
            run = self._reserve(instruction, config, plan, policy)
        elif run.closed is not None:
            raise SiteRefusal(RefusalCode.DENIED, f"run {run_id} was ended here: {run.closed}")
        else:
            self._check_admitted(instruction, config, policy, run)
        length = payload_length(instruction, public)
        kept = account.stored_reply(instruction)
        # Else its charge is not in this ledger, or nobody has the key any more that it is sealed to.
        if kept is not None and kept.head in run.heads and _opens(kept, keys):
            if self.channel is None:
                payload, head = unpack_envelope(kept.leaves, length=length)
                reply = self._leave(Release(instruction, payload, head, length))
            else:
                reply = self._leave(SealedRelease(instruction, kept.leaves, length))
            account.ledger.resend(
                run_id, server_round=instruction.server_round, size=len(kept.leaves), sha256=_sha256(kept.leaves)
            )
            self.log(f"run {run_id} round {instruction.server_round}: asked again, the same bytes are sent again")
            return reply
        self._check_order(instruction, run)
        records = self._open_records(public)
        local_steps = config.federation.local_steps
        moments = instruction.kind == "moments"
        charge = account.charge(
            run.terms, instruction, release="moments" if moments else "update" if local_steps > 1 else "gradient",
            steps=0 if moments else local_steps,
            nonce=self.entropy.rng("head", run_id, account.ledger.runs[run_id].charges).bytes(16),
            again=self.entropy.simulated,
        )  # fmt: skip
        figures: list[StepFigures] = []
        payload = self._payload(instruction, public, records, rows_cap=self._rows_cap(run), tell=figures.append)
        reply = self._leave(Release(instruction, payload, charge.head, length))
        if self.channel is not None:
            question = question_of(self.channel, instruction)
            sealed = self.channel.seal("reply", reply.envelope, context=question, to=keys)
            reply = self._leave(SealedRelease(instruction, sealed, length))
        account.store_reply(instruction, KeptReply(reply.envelope, charge.head, keys.serial if keys else None))
        account.ledger.commit(
            charge, size=len(reply.envelope), sha256=_sha256(reply.envelope),
            fields=[["payload", "int64", [length]], ["head", "uint8", [32]]],
        )  # fmt: skip
        self.log(
            f"run {run_id} round {instruction.server_round}: {_of_steps(figures)} in {time.monotonic() - began:.2f} s,"
            f" epsilon {charge.epsilon_before:.4g} -> {charge.epsilon_after:.4g} of {run.price.epsilon:.4g} reserved"
        )
        return reply

    def _rows_cap(self, run: RunAccount) -> int | None:
        """Rows of the padded work: as reserved, or more where this site has published more units since, or is not
        the site that reserved. Fewer would cut draws more often than the run's delta pays for.
        """
        published = self.config.published_records
        if run.terms.rows_cap is None or published is None:
            return run.terms.rows_cap
        prices = [ledger.runs[run.terms.run].price for ledger in self.account.ledgers if run.terms.run in ledger.runs]
        return max(run.terms.rows_cap, *(padded_rows(run.terms.plan, price, published) for price in prices))

    def _leave(self, release: Release | SealedRelease) -> SiteReply:
        reply = build(release, site_id=self.site_id)
        assert isinstance(reply, SiteReply)
        return reply

    def _check_shown_head(self, instruction: RoundInstruction, run: RunAccount | None) -> None:
        """A head that the server remembers and this ledger does not have: the ledger was set back, or copied."""
        shown = instruction.heads.get(self.site_id)
        if shown is not None and (run is None or shown not in run.heads):
            raise LedgerError(
                f"run {instruction.run_id}: the server shows a release that this ledger does not have",
                hint="the ledger was set back or copied: find the newest one; until then no more of this run leaves",
            )

    def _check_order(self, instruction: RoundInstruction, run: RunAccount) -> None:
        """Nothing before what was charged last is charged: a relay that recorded signed instructions of a run could
        send two of them by turns until the run's slack is used up.

        A simulated site has no relay, and after a power cut its server may lack the sum of an earlier round.
        """
        asked = instruction.server_round, instruction.attempt
        if asked < run.furthest and not self.simulated:
            raise SiteRefusal(
                RefusalCode.MESSAGE,
                f"round {asked[0]}, attempt {asked[1]} of run {instruction.run_id} came after round {run.furthest[0]},"
                f" attempt {run.furthest[1]} was charged",
            )

    def _reserve(
        self, instruction: RoundInstruction, config: RunConfig, plan: PrivacyPlan, policy: SitePolicy
    ) -> RunAccount:
        """Approval, price and ceiling of a new run, then its reservation; no record is read for it."""
        account, unit = self.account, config.privacy.unit
        padded = plan.private and not self.simulated
        lifetimes, prices = [], []
        for ledger in account.ledgers:
            if ledger.lineage.unit != unit:
                raise SiteRefusal(RefusalCode.POLICY, f"lineage '{ledger.lineage.name}' has another unit than {unit}")
            lifetimes.append(policy.ceiling(ledger.lineage.lifetime))
            prices.append(price_run(plan, lifetimes[-1], overflow_share=OVERFLOW_SHARE if padded else 0.0))
        rows_cap = None
        if padded:
            assert self.config.published_records is not None
            rows_cap = max(padded_rows(plan, price, self.config.published_records) for price in prices)
        terms = RunTerms(
            instruction.run_id, config.federation.name, instruction.config_digest, instruction.prompts_digest,
            RELEASE_CODE, plan, rows_cap,
        )  # fmt: skip
        self._check_consent(instruction, config, plan, policy, prices[0])
        for ledger in account.ledgers:
            known = ledger.runs.get(terms.run)
            if known is not None and (known.terms.config_digest, known.terms.plan) != (terms.config_digest, plan):
                raise SiteRefusal(
                    RefusalCode.SITE, f"lineage '{ledger.lineage.name}' knows run {terms.run} with other settings"
                )
        run = account.reserve(terms, prices, lifetimes)
        self.log(
            f"run {terms.run} of {terms.federation} is admitted: epsilon {prices[0].epsilon:.4g} at delta"
            f" {prices[0].delta:.1e} reserved, {account.ledger.left} left"
        )
        return run

    def _check_admitted(
        self, instruction: RoundInstruction, config: RunConfig, policy: SitePolicy, run: RunAccount
    ) -> None:
        """Consent and ceiling of a run that is reserved already: perhaps by another site, whose policy is not ours."""
        ledger = self.account.ledger
        self._check_consent(instruction, config, run.terms.plan, policy, run.price)
        before = [other.price for other in ledger.runs.values() if other.seq < run.seq]
        if not fits(run.price, before, policy.ceiling(ledger.lineage.lifetime)):
            raise BudgetExhausted(
                f"run {run.terms.run} is reserved, and passes the lifetime that this site's policy sets",
                hint="the ceiling was lowered, or another site of this lineage has a higher one",
            )

    def _check_consent(
        self, instruction: RoundInstruction, config: RunConfig, plan: PrivacyPlan, policy: SitePolicy, price: Price
    ) -> None:
        if policy.approve_each_run:
            self._check_approval(instruction, config, plan, price.epsilon, price.delta)
        if policy.max_run_epsilon is not None and price.epsilon > policy.max_run_epsilon:
            raise SiteRefusal(
                RefusalCode.POLICY,
                f"run {instruction.run_id} costs epsilon {price.epsilon:.4g}, a run may cost"
                f" {policy.max_run_epsilon:g}",
            )

    def _check_approval(
        self, instruction: RoundInstruction, config: RunConfig, plan: PrivacyPlan, epsilon: float, delta: float
    ) -> None:
        proposed = self.account.proposed(instruction.run_id)
        asked_for = (instruction.config_digest, instruction.prompts_digest)
        if proposed is None or (proposed.config_digest, proposed.prompts_digest) != asked_for:
            if proposed is None and self.account.pending >= MOST_PENDING:
                raise SiteRefusal(
                    RefusalCode.APPROVAL,
                    f"run {instruction.run_id} is not noted: {MOST_PENDING} proposed runs wait for a decision already",
                )
            proposed = ProposedRun(
                instruction.run_id, config.federation.name, *asked_for, "pending",
                run_summary(config, plan, len(instruction.prompts), epsilon, delta),
                datetime.now(UTC).isoformat(timespec="seconds"),
            )  # fmt: skip
            self.account.write_proposed(proposed)
        if proposed.decision != "approved":
            raise SiteRefusal(
                RefusalCode.DENIED if proposed.decision == "denied" else RefusalCode.APPROVAL,
                f"run {instruction.run_id} is {proposed.decision}: `fedcanvas client runs` shows what it asks for",
            )

    def _payload(
        self, instruction: RoundInstruction, public: PublicSide, records: PrivateRecords, *, rows_cap: int | None,
        tell: Callable[[StepFigures], None],
    ) -> np.ndarray:  # fmt: skip
        """Clipped, noised and in lattice units: nothing before this line may leave."""
        load_weights(public.discriminator, instruction.weights)
        if instruction.kind == "moments":
            return site_moments(
                records, config=public.config, plan=public.plan, discriminator=public.discriminator,
                entropy=self.entropy,
            )  # fmt: skip
        if instruction.fakes is None:
            return site_gradient(
                public.discriminator, records, config=public.config, plan=public.plan, prompts=public.prompts,
                prompt_embeddings=public.prompt_embeddings, entropy=self.entropy,
                server_round=instruction.server_round, rows_cap=rows_cap, tell=tell,
            )  # fmt: skip
        return site_update(
            public.discriminator, records, instruction.fakes, config=public.config, plan=public.plan,
            prompts=public.prompts, prompt_embeddings=public.prompt_embeddings, entropy=self.entropy,
            server_round=instruction.server_round, rows_cap=rows_cap, tell=tell,
        )  # fmt: skip

    def _open_public(self, instruction: RoundInstruction, config: RunConfig, plan: PrivacyPlan) -> PublicSide:
        known = self._public
        # The plan too: the noise is that of the plan which was reserved, whatever another run's plan is.
        if known is not None and (known.config, known.plan, known.prompts.texts) == (config, plan, instruction.prompts):
            return known
        try:
            with _BUILDING:
                encoder = build_encoder(config.text)
                discriminator = build_discriminator(config, embedding_dim=encoder.dim)
                prompts = PromptPool(instruction.prompts)
                embeddings = encoder.encode(prompts.texts).to(config.compute.device)
            build_loss(config.discriminator)  # a name that nobody knows is met here, not after the charge
            OPTIMIZERS.get(config.discriminator_optimizer.name)
        except PromptError as error:
            raise SiteRefusal(RefusalCode.MESSAGE, error.message) from error
        except FedCanvasError as error:
            raise SiteRefusal(RefusalCode.CONFIG, error.message) from error
        self._public = PublicSide(config, plan, prompts, embeddings, encoder, discriminator)
        if known is None or known.config != config:
            self._records = None  # of another preprocessing, encoder or feature map
        return self._public

    def _open_records(self, public: PublicSide) -> PrivateRecords:
        if self._records is None:
            dataset = open_dataset(
                self.folder / self.config.data, config=public.config.data, cache_dir=self.folder / self.config.cache_dir
            )
            self._records = prepare_records(
                dataset, self.own_rows(len(dataset)), config=public.config, encoder=public.encoder,
                discriminator=public.discriminator,
            )  # fmt: skip
            published = self.config.published_records
            if published is not None and self._records.units > published:
                self._records = None
                raise DataError(
                    f"{self.folder / SETTINGS} publishes {published} units and there are more",
                    hint="raise 'published-records': the work of a step is padded by it",
                )
            self.log(f"{len(self._records)} records are ready; {len(dataset.skipped)} rows were skipped")
            if self._records.without_subject:
                self.log(f"{self._records.without_subject} records name no subject and are not used")
        return self._records

    def own_rows(self, count: int) -> np.ndarray:
        """This site's rows of its data set, each once: a row twice would count twice in the clipped sum."""
        if self.config.indices is None:
            return np.arange(count)
        path = self.folder / self.config.indices
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is no list of row numbers: {error}") from None
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise DataError(f"{path} is no list of row numbers")
        if len(np.unique(rows)) != len(rows) or (len(rows) and (rows.min() < 0 or rows.max() >= count)):
            raise DataError(f"{path} names a row twice, or one that the data set of {count} rows does not have")
        return np.asarray(rows, dtype=np.int64)

    def log(self, text: str) -> None:
        """One line to the site's own log, which nobody else reads; never a caption or an image."""
        log(self.folder, text)


def open_site(folder: Path, *, simulated: bool) -> Site:
    """The site in `folder`, opened once a process."""
    with _OPENING:
        key = (folder.resolve(), simulated)
        if key not in _SITES:
            _SITES[key] = Site(folder, simulated=simulated)
        return _SITES[key]


def forget_site(folder: Path) -> None:
    """Closes the site for this process: whoever opens it again reads its files anew."""
    with _OPENING:
        for simulated in (False, True):
            _SITES.pop((folder.resolve(), simulated), None)


def admit(instruction: RoundInstruction) -> RunConfig:
    """The instruction's settings, once they are those of their digest and it is in place in its run.

    Raises:
        SiteRefusal: by public quantities alone.
    """
    config = _settings(instruction.config_json, instruction.config_digest)
    moments, local_steps = instruction.kind == "moments", config.federation.local_steps
    if instruction.server_round > config.federation.rounds or moments != (instruction.server_round == 0):
        raise SiteRefusal(RefusalCode.MESSAGE, f"the run has no round {instruction.server_round}")
    if moments and not config.warm_start.enabled:
        raise SiteRefusal(RefusalCode.MESSAGE, "the run has no warm start")
    if (instruction.fakes is not None) != (not moments and local_steps > 1):
        raise SiteRefusal(RefusalCode.MESSAGE, f"fakes do not go with {local_steps} local steps")
    if instruction.fakes is not None:
        size, channels = config.data.image_size, config.data.channels
        if instruction.fakes.images.shape[1:] != (size, size, channels):
            raise SiteRefusal(RefusalCode.MESSAGE, f"the fakes are not of {size} x {size} x {channels}")
    return config


@lru_cache(maxsize=16)
def _settings(config_json: str, config_digest: str) -> RunConfig:
    """The same for every round of a run, so it is read once."""
    try:
        config = RunConfig.from_json(config_json)
    except ConfigError as error:
        raise SiteRefusal(RefusalCode.CONFIG, error.message) from error
    if config.digest != config_digest:
        raise SiteRefusal(RefusalCode.CONFIG, "the settings are not those of their digest")
    return config


def _plan(config: RunConfig) -> PrivacyPlan:
    """The site's own: nothing of it is taken from the message but public settings."""
    try:
        return make_plan(config)
    except PrivacyError as error:
        raise SiteRefusal(RefusalCode.PLAN, error.message) from error


def padded_rows(plan: PrivacyPlan, price: Price, units: int) -> int:
    """Rows that each step is padded to: a larger draw of `units` has a probability within the price's delta.

    A draw that is larger all the same is cut. That changes what leaves with at most this probability a step, so
    (epsilon, delta) holds with (1 + e^epsilon) times the sum over steps added to delta: `Price.overflow` of it.
    """
    weight = 1 + math.exp(min(price.overflow_epsilon, 700.0))
    probability = price.overflow / max(1, plan.reserved_steps) / weight
    rows = int(binom.isf(probability, units, plan.sampling_rate)) if probability > 1e-300 else units
    while rows < units and binom.sf(rows, units, plan.sampling_rate) > probability:
        rows += 1
    return max(rows, 1)


def run_summary(config: RunConfig, plan: PrivacyPlan, prompts: int, epsilon: float, delta: float) -> list[str]:
    """What a run asks for, in words and public figures, for the person who decides."""
    federation = config.federation
    lines = [
        f"federation {federation.name}: {federation.sites} sites, {federation.rounds} rounds of"
        f" {federation.local_steps} step(s), {config.privacy.retry_slack} more for repeated rounds",
        f"it would cost each {config.privacy.unit} epsilon {epsilon:.4g} at delta {delta:.1e} here, reserved whole",
        f"sampling rate {plan.sampling_rate:g}, noise multiplier {plan.noise_multiplier:g}, clipping norm"
        f" {plan.clipping_norm:g}, {config.privacy.noise} noise",
        f"pictures of {config.data.image_size} px, discriminator {config.discriminator.name}, text encoder"
        f" {config.text.encoder}, {prompts} public prompts",
    ]
    if config.warm_start.enabled:
        lines.append(f"one release of noised moments before the first round, noise {plan.warm_start_noise_multiplier}")
    return lines


def payload_length(instruction: RoundInstruction, public: PublicSide) -> int:
    """Entries of the reply, by public settings alone."""
    if instruction.kind == "moments":
        of = moment_features(public.config, public.discriminator.feature_shape)
        return moment_size(of.size, public.encoder.dim)
    return parameter_count(public.discriminator)


def _of_steps(figures: Sequence[StepFigures]) -> str:
    """The first and the last step of a round, in words; the moments have no steps."""
    if not figures:
        return "moments"
    return str(figures[0]) if len(figures) == 1 else f"{len(figures)} steps, first {figures[0]}; last {figures[-1]}"


def _opens(kept: KeptReply, keys: AggregatorKeys | None) -> bool:
    """Whether the aggregator, with these keys in force, can still open it: it has those and the ones before."""
    if keys is None or kept.serial is None:
        return keys is None and kept.serial is None
    return kept.serial >= keys.serial - 1


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_SITES: dict[tuple[Path, bool], Site] = {}
_OPENING = threading.Lock()
_BUILDING = threading.Lock()  # models are initialised under torch's one global seed
