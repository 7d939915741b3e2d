"""A site: its own settings, its data opened once, and whether and how it answers an instruction.

What decides is the instruction and the site's own files, never the records: everything that depends on them
ends in one code, `RefusalCode.SITE`, and the reason goes to the site's own log.
Not here: the lifetime ledger, which this release does not have yet: a site keeps no account over runs.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from traceback import extract_tb

import numpy as np
import torch
from pydantic import ConfigDict, Field, ValidationError
from torch import Tensor

from client.gate import build_reply
from client.training import PrivateRecords, load_weights, prepare_records, site_gradient, site_moments, site_update
from shared.config import RunConfig, Section, read_toml
from shared.data import open_dataset
from shared.errors import ConfigError, DataError, FedCanvasError, PrivacyError, PromptError
from shared.models import Discriminator, build_discriminator, parameter_count
from shared.moments import moment_size
from shared.privacy.entropy import Entropy, SeededEntropy, SystemEntropy
from shared.privacy.plan import PrivacyPlan, make_plan
from shared.prompts import PromptPool
from shared.records import NAME, RefusalCode, RoundInstruction, SiteReply
from shared.text import CaptionEncoder, build_encoder

SETTINGS = "site.toml"
LOG = "site.log"


class SiteConfig(Section):
    """`site.toml`: what only this site decides. Relative paths start at its folder."""

    model_config = ConfigDict(strict=True)

    site_id: str = Field(pattern=f"^(?:{NAME.pattern})$", description="Name of the site in replies and reports.")
    data: str = Field(min_length=1, description="Folder or file with the captioned images.")
    cache_dir: str = Field("cache", min_length=1, description="Where decoded images are kept.")
    indices: str | None = Field(None, description="A .npy of row numbers: only these rows are this site's.")
    simulated_seed: int | None = Field(
        None, ge=0, lt=2**63, description="Simulations only: seeds the draw and the noise; a deployed site refuses it."
    )

    @classmethod
    def read(cls, folder: Path) -> SiteConfig:
        path = folder / SETTINGS
        if not path.is_file():
            raise ConfigError(f"{folder} is no site: it has no {SETTINGS}", hint="name the folder of one site")
        try:
            return cls.model_validate(read_toml(path))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part).replace("_", "-") for part in first["loc"])
            raise ConfigError(f"{path}: '{place}': {first['msg'].lower()}") from None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        values = self.model_dump(by_alias=True, exclude_none=True)
        lines = [f"{name} = {_toml(value)}\n" for name, value in values.items()]
        (folder / SETTINGS).write_text("".join(lines), encoding="utf-8")


class SiteRefusal(Exception):
    """The site does not answer; `code` leaves it, `reason` goes to its own log."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


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
        self.entropy = entropy or (SystemEntropy() if seed is None else SeededEntropy(seed, self.site_id))
        self._lock = threading.Lock()
        self._public: PublicSide | None = None
        self._records: PrivateRecords | None = None

    @property
    def site_id(self) -> str:
        return self.config.site_id

    def answer(self, instruction: RoundInstruction) -> SiteReply:
        """The one reply to `instruction`; one at a time.

        Raises:
            SiteRefusal: with the code that may leave the site.
        """
        with self._lock:
            config, plan = admit(instruction, simulated=self.simulated)
            torch.set_num_threads(config.compute.site_threads)  # of this thread: they are part of the result's bits
            public = self._open_public(instruction, config, plan)
            if instruction.weights.shape != (parameter_count(public.discriminator),):
                raise SiteRefusal(RefusalCode.MESSAGE, f"{len(instruction.weights)} weights do not fit the model")
            try:
                payload = self._payload(instruction, public, self._open_records(public))
                return build_reply(
                    payload, instruction=instruction, site_id=self.site_id, length=payload_length(instruction, public)
                )
            except FedCanvasError as error:
                raise SiteRefusal(RefusalCode.SITE, error.message) from error

    def _payload(self, instruction: RoundInstruction, public: PublicSide, records: PrivateRecords) -> np.ndarray:
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
                server_round=instruction.server_round,
            )  # fmt: skip
        return site_update(
            public.discriminator, records, instruction.fakes, config=public.config, plan=public.plan,
            prompts=public.prompts, prompt_embeddings=public.prompt_embeddings, entropy=self.entropy,
            server_round=instruction.server_round,
        )  # fmt: skip

    def _open_public(self, instruction: RoundInstruction, config: RunConfig, plan: PrivacyPlan) -> PublicSide:
        known = self._public
        if known is not None and known.config == config and known.prompts.texts == instruction.prompts:
            return known
        try:
            with _BUILDING:
                encoder = build_encoder(config.text)
                discriminator = build_discriminator(config, embedding_dim=encoder.dim)
                prompts = PromptPool(instruction.prompts)
                embeddings = encoder.encode(prompts.texts).to(config.compute.device)
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
                dataset, self._own_rows(len(dataset)), config=public.config, encoder=public.encoder,
                discriminator=public.discriminator,
            )  # fmt: skip
            self.log(f"{len(self._records)} records are ready; {len(dataset.skipped)} rows were skipped")
        return self._records

    def _own_rows(self, count: int) -> np.ndarray:
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


def admit(instruction: RoundInstruction, *, simulated: bool) -> tuple[RunConfig, PrivacyPlan]:
    """The instruction's settings and the site's own plan for them: nothing private is taken from the message.

    Raises:
        SiteRefusal: by public quantities alone.
    """
    config, plan = _settings(instruction.config_json, instruction.config_digest)
    if not plan.private and not simulated:
        raise SiteRefusal(RefusalCode.PLAN, "a deployed site does not answer without privacy")
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
    return config, plan


@lru_cache(maxsize=16)
def _settings(config_json: str, config_digest: str) -> tuple[RunConfig, PrivacyPlan]:
    """The same for every round of a run, so it is read once."""
    try:
        config = RunConfig.from_json(config_json)
    except ConfigError as error:
        raise SiteRefusal(RefusalCode.CONFIG, error.message) from error
    if config.digest != config_digest:
        raise SiteRefusal(RefusalCode.CONFIG, "the settings are not those of their digest")
    try:
        return config, make_plan(config)
    except PrivacyError as error:
        raise SiteRefusal(RefusalCode.PLAN, error.message) from error


def payload_length(instruction: RoundInstruction, public: PublicSide) -> int:
    """Entries of the reply, by public settings alone."""
    if instruction.kind == "moments":
        return moment_size(public.discriminator.feature_shape, public.encoder.dim)
    return parameter_count(public.discriminator)


def log_exception(folder: Path, error: BaseException) -> None:
    """Type and places of `error` to the site's log, and its text only where we wrote it: others quote data."""
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(extract_tb(error.__traceback__)))
    text = f": {error.message}" if isinstance(error, FedCanvasError) else ""
    log(folder, f"{type(error).__name__}{text} at {places}")


def log(folder: Path, text: str) -> None:
    try:
        descriptor = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {' '.join(text.split())}\n")
    except OSError:
        pass  # a full disk must not decide whether a site answers


_SITES: dict[tuple[Path, bool], Site] = {}
_OPENING = threading.Lock()
_BUILDING = threading.Lock()  # models are initialised under torch's one global seed


def _toml(value: str | int) -> str:
    return json.dumps(value, ensure_ascii=False)
