"""A run becomes a released model: its card, its sites' statements, and the signature of whoever releases it.

Nothing is left to belief: figures of the card are computed from the sites' statements, and what does not verify
is never written.
"""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

from shared.bundle import CARD, CONFIG, PROMPTS, README, WEIGHTS, Verified, write_bundle
from shared.bundle import FEDERATION as FEDERATION_FILE
from shared.config import RunConfig
from shared.errors import BundleError
from shared.model_card import SIMULATED, privacy_terms, public_terms, settings_terms, site_terms
from shared.page import counted
from shared.privacy.plan import PrivacyPlan
from shared.prompts import PromptPool
from shared.protection.federation import Federation, SiteKeys
from shared.protection.keys import SigningKey, VerifyKey
from shared.rundir import STATEMENTS, GeneratorModel, RunDirectory, load_model, to_json
from shared.spend import SpendStatement

LIMITS = (
    "Epsilon bounds what this model, and everything that was made of it, may tell about any one {unit} of a site. It is"
    " of one site: somebody whose records lie at several adds theirs up.",
    "The model knows the words of its prompts. It draws nothing reliable for others, and says so.",
    "Where a site pads its work to a public size, draws beyond it are cut; the probability of that is part of the delta"
    " in the site's own ledger.",
)


def release(run: Path, out: Path, *, key: SigningKey, federation: Path | None = None) -> Verified:
    """
    Args:
        run: a finished run directory.
        federation: the operator's folder, for a run between institutions; default is the one that the run lies in.
    Raises:
        BundleError: a site's statement is missing or does not fit, or `out` is there already.
        RunDirectoryError: the run is not finished.
    """
    model, opened = load_model(run), RunDirectory.open(run)
    if out.exists():
        raise BundleError(f"{out} is there already", hint="name a new folder: a released model is never changed")
    contents = _statement_files(opened)
    simulated = opened.entropy == "seeded"
    files: dict[str, bytes] = {f"statements/{site}.json": content for site, content in contents.items()}
    keys: dict[str, VerifyKey | None] = dict.fromkeys(contents)
    if not simulated:
        folder = federation or run.resolve().parents[1]
        files[FEDERATION_FILE], admissions = _evidence(folder, contents)
        for site, (content, admitted) in admissions.items():
            files[f"admissions/{site}.json"], keys[site] = content, admitted.signing
    statements = {
        site: SpendStatement.read(content, what=f"the statement of site {site}", key=keys[site])
        for site, content in contents.items()
    }
    card = make_card(model, opened, statements)
    files |= {
        WEIGHTS: (run / "model/generator.safetensors").read_bytes(),
        CONFIG: to_json(_settings(model, opened.config)),
        PROMPTS: "".join(f"{prompt}\n" for prompt in model.prompts).encode(),
        CARD: to_json(card),
        README: card_in_words(card).encode(),
    }
    return write_bundle(out, files, run=opened.run_id, key=key)


def _statement_files(run: RunDirectory) -> dict[str, bytes]:
    found = {}
    for site, head in sorted(run.heads().items()):
        path = run.path / STATEMENTS / f"{site}.json"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            again = (
                f"`fedcanvas simulate --resume --out {run.path}` writes it"
                if run.entropy == "seeded"
                else "it comes with the site's receipt of the model (`fedcanvas server status`), or as a file of"
                " `fedcanvas client statement`, to be put there"
            )
            raise BundleError(f"the statement of site {site} is missing: {path}", hint=again) from None
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror or error}") from None
        statement = SpendStatement.read(content, what=str(path))
        if head not in statement.heads:  # it may end later: a charge whose answer was late, or never came
            raise BundleError(
                f"{path} ends before the site's last answer in the run, or is of another copy of its ledger",
                hint="get the site's newest statement",
            )
        found[site] = content
    if not found:
        raise BundleError(f"no site has answered in the run {run.path}")
    return found


def _evidence(folder: Path, contents: dict[str, bytes]) -> tuple[bytes, dict[str, tuple[bytes, SiteKeys]]]:
    """The federation's statement, and of each site the admission of the key that signed."""
    try:
        statement = (folder / "federation.json").read_bytes()
    except OSError:
        raise BundleError(
            f"{folder} is no federation's folder: it says whose key each site's is",
            hint="the run lies in FOLDER/runs, or name the folder with --federation",
        ) from None
    known = Federation.read(statement, what=str(folder / "federation.json"))
    admissions: dict[str, tuple[bytes, SiteKeys]] = {}
    for path in (*sorted((folder / "sites").glob("*.json")), *sorted((folder / "revoked").glob("*.json"))):
        content = path.read_bytes()
        keys = SiteKeys.read_admission(content, known.identity, what=str(path))
        if keys.site in contents and json.loads(contents[keys.site]).get("signing-key") == keys.signing.text:
            admissions.setdefault(keys.site, (content, keys))
    if missing := sorted(contents.keys() - admissions.keys()):
        raise BundleError(f"no admission in {folder} has the key that signed for site {missing[0]}")
    return statement, admissions


def _settings(model: GeneratorModel, config: RunConfig) -> dict[str, Any]:
    # The run's own settings, which sites signed: a model that was read is set to be drawn with on the CPU.
    return {
        **settings_terms(config),
        "encoder_fingerprint": model.card["encoder_fingerprint"],
        "embedding_dim": model.encoder.dim,
        "run": json.loads(config.to_json()),
    }


def make_card(model: GeneratorModel, run: RunDirectory, statements: dict[str, SpendStatement]) -> dict[str, Any]:
    """For programs; every figure of privacy is of the sites' statements, and what follows from them is compared."""
    reports = {site: statement.epsilon() for site, statement in statements.items()}
    terms = public_terms(run.config, PromptPool(model.prompts), statements)
    privacy = privacy_terms(run.config, PrivacyPlan.from_dict(model.card["plan"]))
    sites = {
        site: {
            "epsilon": report.epsilon, "prv": report.prv, "pld": report.pld, "rdp": report.rdp,
            **site_terms(statements[site]),
        }
        for site, report in reports.items()
    }  # fmt: skip
    return {
        **terms,
        "fedcanvas": model.card["fedcanvas"],
        "run_id": run.run_id,
        "name": run.path.resolve().name,
        "privacy": {**privacy, "epsilon_max": max(report.epsilon for report in reports.values()), "sites": sites},
        "sites_that_left": run.sites_left(),
        "public": {
            **terms["public"],
            "encoder_fingerprint": model.card["encoder_fingerprint"],
            "front_end_fingerprint": _front_end(model),
        },
        "lock_digest": run.lock_digest,
        "versions": run.read_json("versions.json"),
        **({"warning": SIMULATED} if terms["simulated"] else {}),
    }


def _front_end(model: GeneratorModel) -> str:
    from shared.models import front

    return front.fingerprint() if model.config.discriminator.name == "front" else ""


def card_in_words(card: dict[str, Any]) -> str:
    """`README.md`, in the form that model hubs show."""
    privacy = card["privacy"]
    private, unit = privacy["private"], privacy["unit"]
    cost = f"{privacy['epsilon_max']:.3g}" if not math.isinf(privacy["epsilon_max"]) else "infinite: no privacy"
    who = counted(len(privacy["sites"]), "simulated site" if card["simulated"] else "site")
    rows = "\n".join(
        f"| {site} | {_number(about['epsilon'])} | {about['steps']} | {about['unsampled_releases']} |"
        for site, about in sorted(privacy["sites"].items())
    )
    caution = f"\n**{SIMULATED}**\n" if card["simulated"] else ""
    limits = "\n".join(f"- {sentence.format(unit=unit)}" for sentence in LIMITS)
    encoder, path = card["public"]["text_encoder"], card["public"]["text_encoder_path"]
    path = f", {path}" if path else ""
    means = (
        f"What this model may know about any one {unit}: whoever sees it, and all else that was released in this run,"
        f" gains at most a factor of {math.exp(min(privacy['epsilon_max'], 700)):.3g} in the odds that this {unit} was"
        f" among a site's records, but for a chance of {privacy['delta']:.0e}. The smaller epsilon is, the more that"
        " promises; at 8 it rules out little by itself, and what attacks reach has to be measured."
        if private
        else "This model was trained **without differential privacy**: it may have learned any record by heart."
    )  # fmt: skip
    return f"""\
---
library_name: fedcanvas
pipeline_tag: text-to-image
tags: [text-to-image, gan, federated-learning, differential-privacy]
---
# {card["name"]}

A text-conditioned GAN for pictures of {card["picture"]["size"]} px, trained by {who} of the federation
`{card["federation"]}` that pooled none of their images. Run `{card["run_id"]}`, {privacy["rounds"]} rounds.

## What it cost in privacy

**epsilon {cost}** at delta {privacy["delta"]:.0e}, the largest of all sites; {privacy["adjacency"]} one {unit}.

{means}
{caution}
| site | epsilon | noised steps | noised sums of all records |
|---|---|---|---|
{rows}

- Accountants: {" and ".join(privacy["accountants"]) or "none"}; the larger figure counts.
- Sampling: {privacy["sampling"]}; rate {privacy["sampling_rate"]:.4g}.
- Noise: {privacy["noise"]}, {privacy["noise_multiplier"]:.4g} times the clipping norm. Trusted: {privacy["trusted"]}.
- Each figure follows from a statement that the site signed (`statements/`): `fedcanvas verify` computes it again.

{limits}

## What it was made of, and is public

- {card["public"]["prompts"]} prompts (`prompts.txt`): every text that the generator has ever seen.
- Text encoder `{encoder}`{path}, frozen.
- Discriminator `{card["public"]["discriminator"]}`, with fixed features that were fitted on no data.

## How to use it

```
fedcanvas verify .
fedcanvas generate {shlex.quote(card["example"])} --model .
```

```python
from fedcanvas import Generator

pictures = Generator.load(".").generate({json.dumps([card["example"]], ensure_ascii=False)}, seed=1)
```
"""


def _number(value: float) -> str:
    return "infinite" if math.isinf(value) else f"{value:.4g}"
