"""Trained models that came to a site: what is checked before one is kept, and which are there.

    SITE/models/RUN/          generator.safetensors, discriminator.safetensors, model.json: as the aggregator has them
    SITE/models/RUN/received.json   when it came, of which federation, signed with which of the aggregator's keys

A model comes over the same relay as instructions, signed as they are (`client.app` checks that first), and is kept only
of a run that is in the site's ledger, with the settings and prompts that were agreed to. It is kept whole or not at
all, and nothing of it is run: weights are tensors and the rest is text. What decides is public (the model itself, and
which runs the site took part in) or the site's own policy; no record is read.
Not here: whether the model is any good, what it says was spent (the site's own ledger knows that of this site), and
whether every site got the same one; people can compare the SHA-256 of `model.json`, which names the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from client.account import SiteAccount
from client.policy import SitePolicy, Unit
from client.settings import RELEASE_CODE, SiteRefusal
from shared.config import RunConfig
from shared.disk import fsync_folder, make_folder, write_whole
from shared.errors import ConfigError, RunDirectoryError
from shared.privacy.ledger import RunTerms
from shared.records import MODEL_FILES, ModelOffer, RefusalCode
from shared.rundir import check_model

MODELS, RECEIVED = "models", "received.json"
NO_CARD = (ValueError, KeyError, TypeError, OverflowError, RecursionError)  # what a wrong model.json may raise


def receive(offer: ModelOffer, *, folder: Path, account: SiteAccount, federation: str, signed_with: str) -> None:
    """Keeps the model; the same one again is kept already.

    Args:
        federation: that the site joined.
        signed_with: fingerprint of the aggregator's keys.
    Raises:
        SiteRefusal: with the code that may leave the site.
        FedCanvasError: the ledger cannot be read, or the disk refuses.
    """
    policy, run = SitePolicy.read(folder), offer.run_id
    if not policy.accept_models:
        raise SiteRefusal(RefusalCode.POLICY, f"the policy takes no models (`accept-models`): not that of run {run}")
    if policy.aggregator_keys and signed_with not in policy.aggregator_keys:
        raise SiteRefusal(RefusalCode.POLICY, f"the model of run {run} is signed with the keys '{signed_with}'")
    if policy.code and RELEASE_CODE not in policy.code:
        raise SiteRefusal(RefusalCode.RELEASE, f"the policy does not allow the installed code {RELEASE_CODE}")
    with account.locked():
        known = account.ledger.runs.get(run)
    if known is None or known.terms.federation != federation:
        raise SiteRefusal(RefusalCode.MESSAGE, f"run {run} is none of federation {federation} in this site's ledger")
    try:
        card = check_model(offer.files)
        _claim(card)
    except RunDirectoryError as error:
        raise SiteRefusal(RefusalCode.MESSAGE, f"the model of run {run}: {error.message}") from error
    except NO_CARD as error:
        raise SiteRefusal(RefusalCode.MESSAGE, f"the model of run {run} does not say what was spent") from error
    if card.get("run_id") != run or not _is_as_agreed(card, known.terms):
        raise SiteRefusal(RefusalCode.CONFIG, f"the model of run {run} has another run's name, settings or prompts")
    _keep(offer, folder / MODELS / run, {"federation": federation, "keys": signed_with})


def _is_as_agreed(card: dict[str, Any], terms: RunTerms) -> bool:
    try:
        config = RunConfig.from_table(card["config"])
        prompts = hashlib.sha256(json.dumps(list(card["prompts"])).encode()).hexdigest()
    except (ConfigError, *NO_CARD):
        return False
    return (config.digest, prompts) == (terms.config_digest, terms.prompts_digest)


def _keep(offer: ModelOffer, place: Path, about: dict[str, str]) -> None:
    """The folder appears with all that is in it, and is on disk when this returns."""
    try:
        if not place.exists():
            # No run's name begins so. One that is there is of a process that was killed, and gets all files anew.
            partial = place.with_name(f".{place.name}.partial")
            make_folder(partial, durable=True)
            for name, content in offer.files.items():
                write_whole(partial / name, content)
            note = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **about}
            write_whole(partial / RECEIVED, json.dumps(note, indent=2).encode() + b"\n")
            partial.rename(place)
        elif not all(_has(place / name, content) for name, content in offer.files.items()):
            raise SiteRefusal(
                RefusalCode.MESSAGE, f"{place} holds another model of this run, or a damaged one: it is not replaced"
            )
        for folder in (place.parent, place.parent.parent):  # also the names that a killed process made
            fsync_folder(folder)
    except OSError as error:
        raise RunDirectoryError(f"{place} cannot be written: {error.strerror or error}") from None


def _has(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


# ---- what is there


@dataclass(frozen=True)
class ReceivedModel:
    """One model in SITE/models.

    Attributes:
        received: ISO 8601, UTC; "" where that note is gone.
        federation: as `received`.
        epsilon, delta, unit: what the model says was spent, at most, at each site; `None` where it cannot be read.
        sha256: of `model.json`: the same at the operator and at every site.
        whole: its files are there, and are those that it names.
    """

    run: str
    folder: Path
    received: str
    federation: str
    epsilon: float | None
    delta: float | None
    unit: str | None
    sha256: str
    whole: bool


def received_models(folder: Path) -> list[ReceivedModel]:
    """In the order in which they came. Loads no weights."""
    places = [place for place in (folder / MODELS).glob("*") if place.is_dir() and not place.name.startswith(".")]
    return sorted((_read(place) for place in places), key=lambda model: (model.received, model.run))


def _read(place: Path) -> ReceivedModel:
    contents = {name: (place / name).read_bytes() for name in MODEL_FILES if (place / name).is_file()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    sha256 = digests.pop("model.json", "")
    claim: tuple[float | None, float | None, str | None] = (None, None, None)
    whole = False
    try:
        card = json.loads(contents["model.json"])
        claim, whole = _claim(card), card["files"] == digests
    except NO_CARD:
        pass
    try:
        note = json.loads((place / RECEIVED).read_text(encoding="utf-8"))
        received, federation = str(note["time"]), str(note["federation"])
    except (OSError, ValueError, KeyError, TypeError):
        received = federation = ""
    return ReceivedModel(place.name, place, received, federation, *claim, sha256, whole)


def _claim(card: dict[str, Any]) -> tuple[float, float, str]:
    """(epsilon, delta, unit) that the model says was spent; an error of Python's own where it does not say so."""
    spent = card["spent"]
    epsilon, delta, unit = float(spent["epsilon"]), float(spent["delta"]), str(spent["unit"])
    if math.isnan(epsilon) or epsilon < 0 or not 0 < delta < 1 or unit not in get_args(Unit):
        raise ValueError("what it says was spent cannot be")
    if type(spent["adjacency"]) is not str:
        raise TypeError("it does not say between which data sets epsilon holds")
    return epsilon, delta, unit
