"""A released model as a folder to share: weights, card, and the evidence of what it cost in privacy, all signed.

    model.safetensors      the generator's moving average
    config.json            the run's settings, fingerprints of the text encoder and of the front end
    prompts.txt            the public prompts it was trained on: its grammar and vocabulary
    card.json, README.md   the model card, for programs and for people
    statements/SITE.json   what each site signed that the run spent there (`shared.spend`)
    federation.json, admissions/SITE.json   between institutions: whose key each site's is, signed by the federation
    bundle.json            SHA-256 of every file above, signed by whoever released it

Reading runs no code and believes no figure: digests and signatures are checked, and epsilon is computed from the
statements again. What cannot be checked here is said (`Verified.trusted`). Format: docs/bundle.md.
Not here: how a bundle comes of a run (`server.release`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.config import RunConfig
from shared.disk import write_folder
from shared.errors import BundleError, FedCanvasError, RunDirectoryError
from shared.model_card import SIMULATED, privacy_terms, public_terms, settings_terms, site_terms
from shared.privacy.plan import plan_without_noise
from shared.prompts import PromptPool
from shared.protection.federation import Federation, SiteKeys
from shared.protection.keys import SigningKey, VerifyKey, fingerprint, same_fingerprint
from shared.protection.statements import canonical, each_once, read_statement, sign_statement
from shared.rundir import GeneratorModel, build_model
from shared.spend import MOST_BYTES as STATEMENT_BYTES
from shared.spend import SpendStatement

FORMAT = 1
MANIFEST = "bundle.json"
WEIGHTS, CONFIG, PROMPTS, CARD, README = "model.safetensors", "config.json", "prompts.txt", "card.json", "README.md"
FEDERATION = "federation.json"
FIXED = {WEIGHTS: 2**29, CONFIG: 2**22, PROMPTS: 2**26, CARD: 2**22, README: 2**22}  # the most bytes of each
MANIFEST_BYTES, ADMISSION_BYTES, MOST_SITES = 2**22, 2**20, 2**14
MOST_BYTES = 2**30  # of all files together
_OF_A_SITE = re.compile(r"(statements|admissions)/([A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?)\.json")
_TYPES = {"format": int, "run": str, "released": str, "files": dict, "signing-key": str}
_EPSILONS = ("epsilon", "prv", "pld", "rdp")
CLOSE = 1e-3  # relative: another release's accountants may compute a little otherwise


@dataclass(frozen=True)
class Verified:
    """A bundle whose digests and signatures hold.

    Attributes:
        releaser: fingerprint of the key that signed the bundle.
        federation: fingerprint of the federation whose admissions name the sites' keys; "" where sites were simulated.
        statements: by site.
        epsilon: largest over the sites, computed again from their statements; `None` where that was not asked for.
    """

    folder: Path
    card: dict[str, Any]
    releaser: str
    federation: str
    statements: Mapping[str, SpendStatement]
    digest: str
    epsilon: float | None
    config: RunConfig = field(repr=False)
    prompts: PromptPool = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)

    @property
    def simulated(self) -> bool:
        return any(statement.simulated for statement in self.statements.values())

    @property
    def sites(self) -> int:
        """That the run's settings name, which every site signed."""
        return self.config.federation.sites

    @property
    def code(self) -> list[str]:
        """Digests of the code that the sites name, each once."""
        return sorted({statement.code_digest for statement in self.statements.values()})

    @property
    def absent(self) -> int:
        """Sites that the settings name and that signed nothing."""
        return max(0, self.sites - len(self.statements))

    @property
    def line(self) -> str:
        """One line for whoever uses the model."""
        privacy = self.card["privacy"]
        whose = "computed from their statements" if self.epsilon is not None else "as its releaser says"
        cost = f"epsilon {privacy['epsilon_max']:.3g} {whose}" if privacy["private"] else "no privacy"
        kind = "simulated sites" if self.simulated else "sites"
        sites = f"{len(self.statements)} {f'of {self.sites} ' if self.absent else ''}{kind}"
        return f"{self.folder}: signed by {self.releaser}; {sites}, {cost}; unaltered since"

    @property
    def proved(self) -> list[str]:
        """What the signatures and digests show, in sentences."""
        found = [f"No file was added, removed or altered since the holder of the key {self.releaser} released it."]
        if self.federation:
            found.append(
                f"Each site's key was admitted by the federation with the fingerprint {self.federation}, and each site"
                " signed how many releases its ledger was charged for this run, at which noise, and in which order."
            )
        else:
            found.append(
                "Each simulated site signed how many releases its ledger was charged for this run. The keys were made"
                " by whoever simulated it: they show that the files fit together, and nothing about real institutions."
            )
        if self.epsilon is not None:
            found.append(f"Epsilon, computed again from the statements, is {_figure(self.epsilon)}, as the card says.")
        if all(statement.weights for statement in self.statements.values()):
            found.append("Every site signed that these weights are the model that it was given when the run was over.")
        if all(statement.closed for statement in self.statements.values()):
            found.append("Every site signed that its ledger takes no further charge of this run: these are all.")
        return found

    @property
    def trusted(self) -> list[str]:
        """What nobody can see from these files, in sentences."""
        whom = "whoever simulated the run" if self.simulated else "each site"
        public = self.card["public"]
        unsigned = sorted(site for site, statement in self.statements.items() if not statement.weights)
        open_still = sorted(site for site, statement in self.statements.items() if not statement.closed)
        others = (
            f"That no other site took part: the settings name {self.sites}, {len(self.statements)} signed."
            if self.absent
            else "That no site took part beyond those that the settings count: whoever released it says so."
        )
        return [
            *([f"That these weights are of this run: {', '.join(unsigned)} signed for none."] if unsigned else []),
            *([f"That {', '.join(open_still)} charged no more: the run was open there."] if open_still else []),
            others,
            f"The words of README.md, and on the card {'epsilon, ' if self.epsilon is None else ''}its name, versions,"
            " the lock's digest, the front end's fingerprint and the sites that left: whoever released it says so. All"
            " else on the card follows from what was checked.",
            *([_ENCODER.format(**public)] if public["text_encoder_path"] else []),
            *([SIMULATED] if self.simulated else []),
            f"That {whom} told the truth: that nothing else left it about these records.",
            f"That the code that ran was the release whose digest the statements name: {', '.join(self.code)}.",
            "That the records of different sites are of different people: epsilon is of one site's records.",
            f"That the key {self.releaser} is of whom you think: compare it with them, by another way.",
        ]


def is_bundle(path: Path) -> bool:
    """Whether it looks like one, with its manifest or without."""
    return (path / MANIFEST).is_file() or ((path / WEIGHTS).is_file() and (path / CARD).is_file())


def write_bundle(
    out: Path, files: Mapping[str, bytes], *, run: str, key: SigningKey, released: datetime | None = None
) -> Verified:
    """The folder `out` appears whole and verified, or not at all.

    Args:
        files: all but `bundle.json`, by name.
    Raises:
        BundleError: `out` is there already, or cannot be written, or what it would hold does not verify.
    """
    fields = {
        "format": FORMAT, "run": run, "released": (released or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
        "signing-key": key.public.text,
    }  # fmt: skip
    manifest = json.dumps(sign_statement("bundle", fields, key), indent=2, sort_keys=True).encode() + b"\n"
    with _as_bundle_error(out):
        verified = _verify(out, fields, dict(files), None, recompute=True)
    try:
        write_folder(out, {**files, MANIFEST: manifest})
    except RunDirectoryError as error:
        raise BundleError(error.message, hint=error.hint) from None
    verify(out, recompute=False)  # as others will read it
    return verified


def verify(folder: Path, *, releaser: str | None = None, recompute: bool = True) -> Verified:
    """Checks digests, signatures and figures of a bundle.

    Args:
        releaser: the fingerprint that the bundle must be signed with; `None` takes any and names it.
        recompute: epsilon from the statements, some seconds.
    Raises:
        BundleError: it is none, or anything does not hold. Nothing of it should be used then.
    """
    with _as_bundle_error(folder):
        manifest, files = _read(folder)
        return _verify(folder, manifest, files, releaser, recompute=recompute)


@contextmanager
def _as_bundle_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except BundleError:
        raise
    except FedCanvasError as error:  # a statement that is none, settings that cannot be, noise of no known price
        raise BundleError(f"{folder}: {error.message}", hint=error.hint or _ALTERED) from None
    except UNREADABLE as error:
        raise BundleError(f"{folder}: the card or the settings cannot be read ({type(error).__name__})") from None


def load_bundle(verified: Verified, *, text_encoder: Path | None = None) -> GeneratorModel:
    """The generator, from the bytes that were checked.

    A text encoder of `transformers` is not among them. It is taken from this machine, where a released model cannot
    name what is fetched, and its fingerprint is compared.

    Args:
        text_encoder: its folder, in place of what the settings name.
    """
    return build_model(
        verified.files[WEIGHTS], config=verified.config, prompts=verified.prompts.texts,
        encoder_fingerprint=verified.card["public"]["encoder_fingerprint"], card=verified.card,
        where=str(verified.folder), text_encoder=text_encoder, local_only=True,
    )  # fmt: skip


_ENCODER = (
    "That the text encoder {text_encoder_path} is fit to be used: it is not in this folder, is taken from the machine"
    " that draws, and only its fingerprint is compared."
)
# What a card or settings of any other form make of the lines that read them.
UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, RecursionError, ArithmeticError)
_ALTERED = "it was altered, or is not whole: get it again from whoever released it, and use nothing of this copy"


def _verify(
    folder: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes], releaser: str | None, *, recompute: bool
) -> Verified:
    """`folder` names it to people, and is not read."""
    key = fingerprint(VerifyKey.from_text(manifest["signing-key"]).raw)
    if releaser is not None and not same_fingerprint(releaser, key):
        raise BundleError(
            f"{folder} is signed by {key}, not by '{releaser}'",
            hint="compare the fingerprint with whoever released it, by another way; use nothing of it before",
        )
    card, about = _table(files[CARD]), _table(files[CONFIG])
    config, prompts = _settings_and_prompts(folder, about, files)
    federation = Federation.read(files[FEDERATION], what=FEDERATION) if FEDERATION in files else None
    statements = _statements(files, federation)
    prompts_digest = hashlib.sha256(json.dumps(list(prompts.texts)).encode()).hexdigest()
    expected = (manifest["run"], config.digest, prompts_digest)
    for site, statement in statements.items():
        if (statement.run, statement.config_digest, statement.prompts_digest) != expected:
            raise BundleError(f"{folder}: the statement of site {site} is of another run, other settings or prompts")
        if statement.federation != config.federation.name:
            raise BundleError(f"{folder}: the statement of site {site} is of another federation than the settings")
        if statement.simulated != (federation is None):
            raise BundleError(f"{folder}: the statement of site {site} is of a simulated site among real ones, or none")
        _check_terms(folder, site, statement, config)
        if statement.weights not in ("", manifest["files"][WEIGHTS]):
            raise BundleError(f"{folder}: site {site} signed for other weights", hint=_ALTERED)
    if card["run_id"] != manifest["run"] or set(card["privacy"]["sites"]) != set(statements):
        raise BundleError(f"{folder}: the card and the statements are not about the same run and sites", hint=_ALTERED)
    if type(card["name"]) is not str or not card["name"].isprintable():
        raise BundleError(f"{folder}: the card's name of the model is no line of text")
    _check_card(folder, card, config, prompts, statements)
    for name, value in {**settings_terms(config), "encoder_fingerprint": card["public"]["encoder_fingerprint"]}.items():
        if about[name] != value:
            raise BundleError(f"{folder / CONFIG}: '{name}' is not what settings and card say")
    epsilon = _recomputed(folder, card, statements) if recompute else None
    return Verified(
        folder, card, key, federation.fingerprint if federation else "", statements,
        hashlib.sha256(canonical(manifest["files"])).hexdigest(), epsilon, config, prompts, files,
    )  # fmt: skip


def _settings_and_prompts(
    folder: Path, about: Mapping[str, Any], files: Mapping[str, bytes]
) -> tuple[RunConfig, PromptPool]:  # fmt: skip
    config = RunConfig.from_table(about["run"], origin=f"{folder / CONFIG}")
    return config, PromptPool(tuple(files[PROMPTS].decode().splitlines()))


def _table(content: bytes) -> dict[str, Any]:
    """A name that stands twice could mean one thing here and another to the next reader."""
    found = json.loads(content, object_pairs_hook=each_once)
    if not isinstance(found, dict):
        raise TypeError("no JSON object")
    return found


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, files), once every file is the one that the signed manifest names, and there is no other."""
    if not folder.is_dir():
        raise BundleError(f"there is no folder {folder}")
    if not (folder / MANIFEST).is_file():
        raise BundleError(
            f"{folder} is no released model, or no whole copy of one: it has no {MANIFEST}",
            hint="`fedcanvas release RUN --out FOLDER` makes one",
        )
    content = _content(folder / MANIFEST, MANIFEST_BYTES)
    try:
        version = json.loads(content).get("format")
    except (ValueError, AttributeError, RecursionError):
        raise BundleError(f"{folder / MANIFEST} is no JSON: the copy was cut off") from None
    if version != FORMAT:
        raise BundleError(
            f"{folder} has format {version!r}, this release reads {FORMAT}", hint="install the release that made it"
        )
    manifest = read_statement(
        content, "bundle", _TYPES, None, what=f"the manifest {folder / MANIFEST}", most_bytes=MANIFEST_BYTES
    )
    named, sizes = manifest["files"], dict[str, int]()
    for name, digest in named.items():
        of_a_site = _OF_A_SITE.fullmatch(name)
        if not (name in FIXED or name == FEDERATION or of_a_site) or type(digest) is not str:
            raise BundleError(f"{folder / MANIFEST} names {name!r}, which no released model has")
        of_a_statement = of_a_site is not None and of_a_site[1] == "statements"
        sizes[name] = FIXED.get(name, STATEMENT_BYTES if of_a_statement else ADMISSION_BYTES)
    if len(named) > 2 * MOST_SITES or not FIXED.keys() <= named.keys():
        raise BundleError(f"{folder / MANIFEST} does not name all that a released model has")
    there = _there(folder)
    if more := sorted(there - named.keys() - {MANIFEST}):
        raise BundleError(f"{folder} holds a file that was not released: {more[0]}", hint="remove it, or get it again")
    if missing := sorted(named.keys() - there):
        raise BundleError(f"{folder / missing[0]} is missing", hint=_ALTERED)
    files, left = dict[str, bytes](), MOST_BYTES
    for name, most in sizes.items():
        files[name] = _content(folder / name, min(most, left))
        left -= len(files[name])
    for name, found in files.items():
        if hashlib.sha256(found).hexdigest() != named[name]:
            raise BundleError(f"{folder / name} is not the file that was released", hint=_ALTERED)
    return manifest, files


def _there(folder: Path) -> set[str]:
    """Names of all files below; `BundleError` for what is neither a file nor one of the two folders."""
    found = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode) and name in ("statements", "admissions"):
            continue
        if not stat.S_ISREG(mode):
            raise BundleError(f"{path} is neither a file of a released model nor a folder of one")
        found.add(name)
    return found


def _content(path: Path, most: int) -> bytes:
    try:
        # No link, whose file may be anybody's, and nothing that a read would wait for.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BundleError(f"{path} is no file of its own")
            content = file.read(most + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(content) > most:
        raise BundleError(f"{path} is larger than {most} bytes")
    return content


def _statements(files: Mapping[str, bytes], federation: Federation | None) -> dict[str, SpendStatement]:
    """Of every site, by the key that the federation admitted, or by the one that a simulated site names itself."""
    found = {}
    by_kind: dict[str, dict[str, bytes]] = {"statements": {}, "admissions": {}}
    for name, content in files.items():
        if (match := _OF_A_SITE.fullmatch(name)) is not None:
            by_kind[match[1]][match[2]] = content
    admitted = {}
    if federation is not None:
        for site, content in by_kind["admissions"].items():
            keys = SiteKeys.read_admission(content, federation.identity, what=f"the admission of site {site}")
            if (keys.site, keys.federation) != (site, federation.name):
                raise BundleError(f"the admission of site {site} is of another site or federation")
            admitted[site] = keys.signing
    if by_kind["admissions"].keys() != (by_kind["statements"].keys() if federation is not None else set()):
        raise BundleError("admissions and statements are not of the same sites")
    for site, content in by_kind["statements"].items():
        what = f"the spend statement of site {site}"
        statement = SpendStatement.read(content, what=what, key=admitted.get(site))
        if statement.site != site or (federation is not None and statement.federation != federation.name):
            raise BundleError(f"{what} is of another site or federation")
        found[site] = statement
    if len({statement.signing.text for statement in found.values()}) != len(found):
        raise BundleError("two sites have the same key")
    if not found:
        raise BundleError("no site says what was spent")
    return found


def _check_terms(folder: Path, site: str, statement: SpendStatement, config: RunConfig) -> None:
    """`BundleError` unless plan and charges are such as the run's settings make: the head does not hold the steps."""
    plan, local_steps = statement.plan, config.federation.local_steps
    bare = replace(plan, noise_multiplier=0.0, warm_start_noise_multiplier=None)
    noise = [plan.noise_multiplier] if plan.private else []
    if plan.private and config.warm_start.enabled:
        noise.append(plan.warm_start_noise_multiplier or 0.0)
    elif plan.warm_start_noise_multiplier is not None:
        raise BundleError(f"{folder}: the plan of site {site} has a warm start, and the run has none")
    if bare != plan_without_noise(config) or not all(0 < one < math.inf for one in noise):
        raise BundleError(f"{folder}: the plan of site {site} is not one that the run's settings make")
    step = ("gradient" if local_steps == 1 else "update", local_steps)
    for server_round, _, release, steps, *_ in statement.charges:
        first = server_round == 0  # the warm start
        if server_round > config.federation.rounds or (release, steps) != (("moments", 0) if first else step):
            raise BundleError(f"{folder}: a charge of site {site} is not of a round of this run")


def _check_card(
    folder: Path, card: Mapping[str, Any], config: RunConfig, prompts: PromptPool,
    statements: Mapping[str, SpendStatement],
) -> None:  # fmt: skip
    """`BundleError` unless the card says, but for epsilon, what settings, prompts and statements make."""
    privacy, sites = card["privacy"], card["privacy"]["sites"]
    figures = [privacy["epsilon_max"], *(told[name] for told in sites.values() for name in _EPSILONS)]
    if not all(type(figure) in (int, float) or figure == "inf" for figure in figures):
        raise BundleError(f"{folder}: an epsilon of the card is no number")
    _compare(folder, card, public_terms(config, prompts, statements), "the run")
    for site, statement in statements.items():
        if sites[site]["head"] != statement.head:
            raise BundleError(
                f"{folder}: the statement of site {site} does not end where the card says",
                hint="it is older than the card, or leaves charges out",
            )
        _compare(folder, privacy, privacy_terms(config, statement.plan), f"the plan of site {site}")
        _compare(folder, sites[site], site_terms(statement), f"the statement of site {site}")


def _compare(folder: Path, told: Mapping[str, Any], true: Mapping[str, Any], whose: str) -> None:
    """Every entry of `true`, nested ones too; JSON's text tells true from 1."""
    for name, value in true.items():
        if isinstance(value, dict):
            _compare(folder, told[name], value, whose)
        elif json.dumps(told[name]) != json.dumps(value):
            raise BundleError(f"{folder}: the card has another {name.replace('_', ' ')} than {whose}")


def _recomputed(folder: Path, card: Mapping[str, Any], statements: Mapping[str, SpendStatement]) -> float:
    """The largest epsilon of a site, once each is what the card says."""
    privacy, largest = card["privacy"], 0.0
    for site, statement in statements.items():
        report = statement.epsilon()
        for name in _EPSILONS:
            told, true = float(privacy["sites"][site][name]), getattr(report, name)
            if not _close(told, true):
                by = "" if name == "epsilon" else f" by {name.upper()}"
                raise BundleError(
                    f"{folder}: the card says epsilon {_figure(told)}{by} for site {site}, its statement makes"
                    f" {_figure(true)}"
                )
        largest = max(largest, report.epsilon)
    if not _close(float(privacy["epsilon_max"]), largest):
        raise BundleError(f"{folder}: the card's largest epsilon is not that of its sites")
    return largest


def _close(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=CLOSE)


def _figure(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.4g}"


def read_unverified(folder: Path, *, text_encoder: Path | None = None) -> GeneratorModel:
    """The generator of a folder that looks like a released model, whatever its evidence; reading it runs no code.

    Raises:
        BundleError: its weights, settings or prompts cannot be read.
    """
    files = {name: _content(folder / name, most) for name, most in FIXED.items()}
    try:
        card, about = json.loads(files[CARD]), json.loads(files[CONFIG])
        config, prompts = _settings_and_prompts(folder, about, files)
        return build_model(
            files[WEIGHTS], config=config, prompts=prompts.texts, encoder_fingerprint=str(about["encoder_fingerprint"]),
            card=card, where=str(folder), text_encoder=text_encoder, local_only=True,
        )  # fmt: skip
    except BundleError:
        raise
    except FedCanvasError as error:
        raise BundleError(f"{folder} cannot be read: {error.message}", hint=error.hint) from None
    except UNREADABLE as error:
        raise BundleError(f"{folder} cannot be read ({type(error).__name__})") from None
