"""A released model holds as it was signed, or is refused: files, signatures, statements, plans and figures.

One real simulated run, released by the commands; what lies beyond it is signed here by keys that the test holds, so
that each refusal is of the one thing that is wrong. Oracles: the analytic Gaussian mechanism, and `dp_accounting`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from gaussian_oracle import epsilon_of_gaussians
from signed_release import CODE, SignedRun, admission, charges_of, head_after, signed_run

from server.generator import Generator, public_prompts
from server.release import release
from shared import disk
from shared.bundle import MANIFEST, WEIGHTS, load_bundle, verify
from shared.cli import run
from shared.errors import BundleError, RunDirectoryError, TrustError
from shared.privacy.ledger import Ledger
from shared.privacy.plan import make_plan
from shared.protection.keys import SigningKey, fingerprint
from shared.protection.statements import canonical, sign_statement
from shared.rundir import load_model
from shared.spend import SpendStatement
from shared.tree import code_digest
from simulations.shapes import make_shapes

ROUNDS = 3
SIMULATE = [
    "--rounds", str(ROUNDS), "--set", "training.fakes=8", "--set", "training.generator-batch=8",
    "--set", "compute.server-threads=1", "--set", "federation.published-records=90",
    "--set", "privacy.sampling-rate=1.0",  # every step takes every record: the whole run is one Gaussian
]  # fmt: skip
MOMENTS = (0, 1, "moments", 0, "a" * 64, "0" * 32)


def sign_anew(folder: Path, key: SigningKey, **changes: Any) -> None:
    """The manifest of what lies in the folder now, signed; `changes` replace its fields."""
    fields = json.loads((folder / MANIFEST).read_text())
    for name in ("kind", "signature"):
        fields.pop(name, None)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    digests = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    fields |= {"files": digests, "signing-key": key.public.text, **changes}
    (folder / MANIFEST).write_bytes(json.dumps(sign_statement("bundle", fields, key)).encode())


def edit_card(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    card = json.loads((folder / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))


def refused(folder: Path, said: str, **options: Any) -> None:
    with pytest.raises(BundleError, match=said):
        verify(folder, **options)


# ---- a real run, by the commands


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `run`, its sites, the key `key.pem` and the released model `model`."""
    folder = tmp_path_factory.mktemp("bundle")
    make_shapes(folder / "data", count=90, seed=1, image_size=8)
    assert run(["simulate", "toy", "--data", str(folder / "data"), "--out", str(folder / "run"), *SIMULATE]) == 0
    key = ["--key", str(folder / "key.pem")]
    assert run(["release", str(folder / "run"), "--out", str(folder / "model"), *key]) == 0
    return folder


def test_a_released_run_verifies_and_its_epsilon_is_that_of_a_gaussian(
    simulated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(simulated / "model"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    plan = json.loads((simulated / "run/model/model.json").read_text())["plan"]
    expected = epsilon_of_gaussians(plan["noise_multiplier"], ROUNDS, 1e-4)
    assert told["epsilon"] == pytest.approx(expected, rel=1e-6)
    assert told["sites"] == {"site-00": told["epsilon"], "site-01": told["epsilon"]}
    assert told["simulated"] is True
    assert told["signed_by"] == fingerprint(SigningKey.read(simulated / "key.pem").public.raw)


def test_what_verify_says_names_what_is_shown_and_what_is_trusted(
    simulated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(simulated / "model")]) == 0
    out, _ = capsys.readouterr()
    epsilon = f"{verify(simulated / 'model').epsilon:.4g}"
    assert f"epsilon {epsilon} at delta 1e-04, add/remove one example" in out
    assert f"site-01      epsilon {epsilon}: 3 charges, 3 steps" in out
    assert out.index("shown:") < out.index("to be trusted:")
    assert "nothing about real institutions" in out


def test_statements_hold_the_charges_of_the_sites_ledgers(simulated: Path) -> None:
    verified = verify(simulated / "model", recompute=False)
    for site, statement in verified.statements.items():
        ledger = Ledger(simulated / "run-sites" / site / "lineages" / site)
        charges = [entry for entry in ledger.entries if entry["kind"] == "charge"]
        names = ("server_round", "attempt", "release", "steps", "instruction_digest", "nonce")
        assert [list(charge) for charge in statement.charges] == [[one[name] for name in names] for one in charges]
        assert statement.head == head_after(statement.charges)
        assert [charge[0] for charge in statement.charges] == [1, 2, 3]


def test_the_bundle_holds_the_runs_generator_settings_and_prompts(simulated: Path) -> None:
    loaded, mine = load_bundle(verify(simulated / "model", recompute=False)), load_model(simulated / "run")
    weights = loaded.generator.state_dict()
    assert weights.keys() == mine.generator.state_dict().keys()
    assert all((weights[name] == value).all() for name, value in mine.generator.state_dict().items())
    assert (loaded.config, loaded.prompts) == (mine.config, mine.prompts)
    names = {path.name for path in (simulated / "model").rglob("*") if path.is_file()}
    assert names == {
        "model.safetensors", "config.json", "prompts.txt", "card.json", "README.md", "bundle.json", "site-00.json",
        "site-01.json",
    }  # fmt: skip


def test_a_release_is_of_a_run_that_is_finished_to_a_folder_that_is_new(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = ["--key", str(simulated / "key.pem")]
    assert run(["release", str(simulated / "run"), "--out", str(simulated / "model"), *key]) == 10
    assert "is there already" in capsys.readouterr().err
    unfinished = tmp_path / "unfinished"
    shutil.copytree(simulated / "run", unfinished)
    shutil.rmtree(unfinished / "model")
    assert run(["release", str(unfinished), "--out", str(tmp_path / "model"), *key]) == 8
    assert "is not finished" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_the_key_is_made_once_for_its_owner_alone_and_a_passphrase_is_asked_for(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "secret").write_text("a passphrase\n")
    (tmp_path / "secret").chmod(0o600)
    given = ["release", str(simulated / "run"), "--passphrase-file", str(tmp_path / "secret")]
    assert run([*given, "--out", str(tmp_path / "one")]) == 0
    key = tmp_path / "config/fedcanvas/releaser.pem"
    assert f"a key to release with was made: {key}" in capsys.readouterr().err
    assert key.stat().st_mode & 0o777 == 0o600
    assert b"ENCRYPTED" in key.read_bytes()
    assert run([*given, "--out", str(tmp_path / "two")]) == 0
    assert "a key to release" not in capsys.readouterr().err
    assert verify(tmp_path / "one", recompute=False).releaser == verify(tmp_path / "two", recompute=False).releaser
    assert run(["release", str(simulated / "run"), "--out", str(tmp_path / "three")]) == 10
    assert "passphrase of the key" in capsys.readouterr().err
    assert not (tmp_path / "three").exists()


# ---- files: each as it was released, and no other


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SignedRun:
    return signed_run(tmp_path_factory.mktemp("signed") / "runs/a", {"privacy.sampling-rate": 1.0})


@pytest.fixture(scope="module")
def pristine(made: SignedRun) -> Path:
    return made.release(made.path.parents[1] / "model")


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


NAMES = [
    "model.safetensors", "config.json", "prompts.txt", "card.json", "README.md", "statements/site-0.json", MANIFEST,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
def test_a_flipped_bit_anywhere_is_refused(bundle: Path, name: str, place: float) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[int(place * len(content))] ^= 1
    (bundle / name).write_bytes(content)
    refused(bundle, ".")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_missing_or_cut_off_is_refused(bundle: Path, name: str) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[: len(content) // 2])
    refused(bundle, "is not the file that was released" if name != MANIFEST else "is no JSON: the copy was cut off")
    (bundle / name).unlink()
    refused(bundle, "is missing" if name != MANIFEST else "is no released model")


def test_a_digest_that_was_fixed_up_without_the_signature_is_refused(
    bundle: Path, made: SignedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_card(bundle, lambda card: card["privacy"].update(epsilon_max=0.1))
    signed = json.loads((bundle / MANIFEST).read_text())
    sign_anew(bundle, made.releaser)
    fixed_up = {**json.loads((bundle / MANIFEST).read_text()), "signature": signed["signature"]}
    (bundle / MANIFEST).write_text(json.dumps(fixed_up))
    assert run(["verify", str(bundle)]) == 10
    assert "is not signed by the key" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["more.json", "statements/site-9.json", "model.pkl", ".hidden", "statements/a/b.json"])
def test_a_file_that_was_not_released_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"{}")
    refused(bundle, "holds a file that was not released|is neither a file of a released model")


def test_links_and_other_things_than_files_are_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "prompts.txt").rename(tmp_path / "prompts.txt")
    (bundle / "prompts.txt").symlink_to(tmp_path / "prompts.txt")  # the same content, today
    refused(bundle, "neither a file")
    (bundle / "prompts.txt").unlink()
    os.mkfifo(bundle / "prompts.txt")  # reading it would wait for ever
    refused(bundle, "neither a file")
    (bundle / "prompts.txt").unlink()
    (tmp_path / "prompts.txt").rename(bundle / "prompts.txt")
    (bundle / "statements").rename(tmp_path / "statements")
    (bundle / "statements").symlink_to(tmp_path / "statements")
    refused(bundle, "neither a file")


@pytest.mark.parametrize(
    "name",
    ["../outside.json", "/etc/passwd", "statements/../../outside.json", "statements/.json", "statements/a/b.json",
     "run.pkl", "statements/site-0.pkl", "STATEMENTS/site-0.json", "statements/site-0.json\n", ""],
)  # fmt: skip
def test_a_manifest_that_names_anything_else_is_refused_before_it_is_read(
    bundle: Path, made: SignedRun, name: str
) -> None:
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    sign_anew(bundle, made.releaser, files={**files, name: "0" * 64})
    refused(bundle, "which no released model has")


def test_a_manifest_without_one_of_the_files_is_refused(bundle: Path, made: SignedRun) -> None:
    (bundle / "README.md").unlink()
    sign_anew(bundle, made.releaser)
    refused(bundle, "does not name all")


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_format_is_named(bundle: Path, made: SignedRun, version: Any) -> None:
    sign_anew(bundle, made.releaser, format=version)
    refused(bundle, f"has format {version!r}, this release reads 1")


def test_a_field_more_in_the_manifest_is_refused(bundle: Path, made: SignedRun) -> None:
    sign_anew(bundle, made.releaser, remark="trust me")
    refused(bundle, "'remark' unknown")


def test_weights_that_are_a_pickle_run_nothing_even_if_they_were_signed(
    bundle: Path, made: SignedRun, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    (bundle / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    sign_anew(bundle, made.releaser)
    with pytest.raises(RunDirectoryError, match="weights"):
        load_bundle(verify(bundle, recompute=False))
    assert not (tmp_path / "ran").exists()


def test_the_releaser_is_the_one_that_was_asked_for(
    bundle: Path, made: SignedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    own = fingerprint(made.releaser.public.raw)
    assert run(["verify", str(bundle), "--releaser", f" {own.replace(' ', '  ')} "]) == 0
    other = SigningKey.generate()
    sign_anew(bundle, other)  # everything in it is as before
    assert verify(bundle, recompute=False).releaser == fingerprint(other.public.raw)
    capsys.readouterr()
    assert run(["verify", str(bundle), "--releaser", own]) == 10
    assert f"is signed by {fingerprint(other.public.raw)}, not by '{own}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "a red circle", "--out", "{folder}/pictures", "--model"],
        ["serve", "--port", "0", "--model"],
        ["export", "--out", "{folder}/exported"],
        ["describe", "red", "--model"],
    ],
    ids=lambda command: command[0],
)
def test_what_draws_refuses_a_model_that_another_key_or_none_signed(
    bundle: Path, made: SignedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    line = [word.format(folder=tmp_path) for word in command]
    own, other = fingerprint(made.releaser.public.raw), fingerprint(SigningKey.generate().public.raw)
    assert run([*line, str(bundle), "--releaser", other]) == 10
    assert f"is signed by {own}, not by '{other}'" in capsys.readouterr().err
    # Whoever takes the signature away makes it a run of somebody's own.
    for unsigned in (made.path, made.path / "model"):
        assert run([*line, str(unsigned), "--releaser", own]) == 10
        assert f"nobody signed it, so neither did '{own}'" in capsys.readouterr().err
    assert run([*line, str(bundle), "--releaser", own, "--unverified"]) == 2
    assert "not verified cannot be known" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()
    assert not (tmp_path / "exported").exists()


def test_a_model_of_the_releaser_that_was_named_draws(bundle: Path, made: SignedRun) -> None:
    own = fingerprint(made.releaser.public.raw)
    assert Generator.load(bundle, releaser=own).digest == Generator.load(bundle).digest


def test_words_alone_come_with_the_line_of_the_whole_model(bundle: Path, made: SignedRun) -> None:
    for path in (bundle, made.path, made.path / "model"):
        generator = Generator.load(path)
        assert public_prompts(path) == (generator.prompts, generator.line)


def test_a_disk_that_fills_up_leaves_neither_the_folder_nor_a_part_of_it(
    made: SignedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(path: Path, content: bytes, **options: Any) -> Path:
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path, content, **options)

    whole = disk.write_whole
    monkeypatch.setattr(disk, "write_whole", write)
    with pytest.raises(BundleError, match="model cannot be written: No space left on device"):
        made.release(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    partial = tmp_path / ".model.partial"  # what a killed process left
    partial.mkdir()
    (partial / "leftover.json").write_text("{}")
    assert verify(made.release(tmp_path / "model"), recompute=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- statements: of every site, of this run, up to its end


def site_states(made: SignedRun, bundle: Path, charges: list[Any], **changes: Any) -> None:
    """Another statement of site-0 by its own key in the bundle, which its releaser signs anew."""
    kept = (made.path / "statements/site-0.json").read_bytes()
    try:
        made.state("site-0", charges, **changes)
        shutil.copy(made.path / "statements/site-0.json", bundle / "statements/site-0.json")
    finally:
        (made.path / "statements/site-0.json").write_bytes(kept)
    sign_anew(bundle, made.releaser)


def test_a_statement_that_leaves_out_the_last_charge_is_refused(bundle: Path, made: SignedRun) -> None:
    site_states(made, bundle, charges_of(made.run.config)[:-1])
    refused(bundle, "does not end where the card says")


def test_a_statement_that_leaves_out_a_charge_in_between_is_refused(bundle: Path, made: SignedRun) -> None:
    charges = charges_of(made.run.config)
    site_states(made, bundle, [*charges[:1], *charges[2:]])
    refused(bundle, "does not end where the card says")
    # With the head of the whole it contradicts itself, whoever signed it.
    site_states(made, bundle, [*charges[:1], *charges[2:]], head=head_after(charges))
    refused(bundle, "its charges do not make its head")


def test_a_site_without_a_statement_is_refused(bundle: Path, made: SignedRun) -> None:
    (bundle / "statements/site-1.json").unlink()
    refused(bundle, "is missing")
    sign_anew(bundle, made.releaser)
    refused(bundle, "not about the same run and sites")
    shutil.rmtree(bundle / "statements")
    sign_anew(bundle, made.releaser)
    refused(bundle, "no site says what was spent")


def test_a_statement_of_another_site_run_or_settings_is_refused(bundle: Path, made: SignedRun) -> None:
    charges = charges_of(made.run.config)
    for changes in ({"run": "another"}, {"config_digest": "d" * 64}, {"prompts_digest": "d" * 64}):
        site_states(made, bundle, charges, **changes)
        refused(bundle, "is of another run, other settings or prompts")
    statement = SpendStatement.read((bundle / "statements/site-0.json").read_bytes(), what="it")
    content = canonical(replace(statement, site="site-7").sign(made.sites["site-0"]))
    (bundle / "statements/site-0.json").write_bytes(content)
    sign_anew(bundle, made.releaser)
    refused(bundle, "is of another site or federation")
    site_states(made, bundle, charges, simulated=False)
    refused(bundle, "is of a simulated site among real ones, or none")


def test_one_key_for_two_sites_is_refused(bundle: Path, made: SignedRun) -> None:
    statement = SpendStatement.read((bundle / "statements/site-0.json").read_bytes(), what="it")
    content = canonical(replace(statement, site="site-1").sign(made.sites["site-0"]))
    (bundle / "statements/site-1.json").write_bytes(content)
    sign_anew(bundle, made.releaser)
    refused(bundle, "two sites have the same key")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise_multiplier": 9.0}, "another noise multiplier than the plan of site site-0"),
        ({"noise_multiplier": 0.0}, "not one that the run's settings make"),
        ({"noise_multiplier": math.inf}, "cannot be read|not one that"),
        ({"sampling_rate": 0.01}, "not one that the run's settings make"),
        ({"delta": 1e-2}, "not one that the run's settings make"),
        ({"reserved_steps": 10_000}, "not one that the run's settings make"),
        ({"private": False}, "not one that the run's settings make"),
        ({"warm_start_noise_multiplier": 9.0}, "has a warm start, and the run has none"),
    ],
)
def test_a_plan_that_the_settings_do_not_make_is_refused(
    bundle: Path, made: SignedRun, changes: dict[str, Any], said: str
) -> None:
    altered = replace(make_plan(made.run.config), **changes)
    try:
        site_states(made, bundle, charges_of(made.run.config), plan=altered)
    except ValueError:
        assert changes == {"noise_multiplier": math.inf}  # cannot even be written
        return
    refused(bundle, said, recompute=False)


def test_steps_that_are_not_those_of_a_round_are_refused(tmp_path: Path) -> None:
    # The head of a run does not hold the steps, so a statement with fewer has the head that the server remembers.
    long_rounds = {"federation.local-steps": 4, "privacy.sampling-rate": 1.0}
    made = signed_run(tmp_path / "runs/a", long_rounds)
    bundle = made.release(tmp_path / "model")
    charges = charges_of(made.run.config)
    fewer = [(*charge[:3], 1, *charge[4:]) for charge in charges]
    assert head_after(fewer) == head_after(charges)
    site_states(made, bundle, fewer)
    edit_card(bundle, lambda card: card["privacy"]["sites"]["site-0"].update(steps=len(fewer)))
    sign_anew(bundle, made.releaser)
    refused(bundle, "a charge of site site-0 is not of a round of this run", recompute=False)


def test_more_charges_than_the_plan_reserves_have_no_price(tmp_path: Path) -> None:
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0}, sites=1)
    charges = [(1, attempt, "gradient", 1, "a" * 64, f"{attempt:032x}") for attempt in range(1, 20)]
    made.remember({"site-0": made.state("site-0", charges)})
    with pytest.raises(TrustError, match="charged more than the plan of run"):
        made.release(tmp_path / "model")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (0, -1), (0, True), (1, 0), (2, "query"), (2, "gradients"), (3, 0), (3, -1), (3, 1.0), (4, "a"), (4, "A" * 64),
        (5, "0" * 31), (5, None),
    ],
)  # fmt: skip
def test_a_charge_that_cannot_be_is_refused(made: SignedRun, part: int, value: Any) -> None:
    table = json.loads((made.path / "statements/site-0.json").read_bytes())
    table["charges"][1][part] = value
    del table["signature"], table["kind"]
    if isinstance(value, float):
        with pytest.raises(TrustError):  # numbers with a point are not read at all
            SpendStatement.read(json.dumps(sign_statement("spend", table, made.sites["site-0"])).encode(), what="it")
        return
    with pytest.raises(TrustError, match="charge 2 is none"):
        SpendStatement.read(sign_statement("spend", table, made.sites["site-0"]), what="it")


def test_a_statement_under_another_key_than_the_sites_is_refused(made: SignedRun) -> None:
    content = (made.path / "statements/site-0.json").read_bytes()
    with pytest.raises(TrustError, match="not signed by the key"):
        SpendStatement.read(content, what="it", key=made.sites["site-1"].public)


# ---- the card: what it says is what the statements make


def test_a_lower_epsilon_on_the_card_is_refused_though_the_releaser_signed_it(bundle: Path, made: SignedRun) -> None:
    edit_card(bundle, lambda card: card["privacy"].update(epsilon_max=0.5))
    sign_anew(bundle, made.releaser)
    refused(bundle, "largest epsilon is not that of its sites")
    edit_card(bundle, lambda card: card["privacy"]["sites"]["site-0"].update(epsilon=0.5))
    sign_anew(bundle, made.releaser)
    refused(bundle, "the card says epsilon 0.5 for site site-0, its statement makes")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("delta", 1e-9, "another delta"), ("unit", "subject", "another unit"), ("private", False, "another private"),
        ("noise_multiplier", 99.0, "another noise multiplier"), ("sampling_rate", 0.1, "another sampling rate"),
        ("clipping_norm", 0.1, "another clipping norm"),
    ],
)  # fmt: skip
def test_a_card_that_tells_another_plan_is_refused(
    bundle: Path, made: SignedRun, name: str, value: Any, said: str
) -> None:
    edit_card(bundle, lambda card: card["privacy"].update({name: value}))
    sign_anew(bundle, made.releaser)
    refused(bundle, said, recompute=False)


def test_a_card_or_settings_of_any_other_form_are_refused_and_nothing_else_is_raised(
    bundle: Path, made: SignedRun
) -> None:
    strange: list[Any] = [None, [], "x", 3, {}]
    parts = {"card.json": ("privacy", "name", "example", "run_id", "federation"), "config.json": ("run",)}
    for name, fields in parts.items():
        original = json.loads((bundle / name).read_text())
        contents = [*strange, *({**original, field: value} for field in fields for value in strange if value != "x")]
        if name == "card.json":
            sites = [{**original["privacy"], "sites": value} for value in strange]
            contents += [{**original, "privacy": privacy} for privacy in sites]
        for content in contents:
            (bundle / name).write_text(json.dumps(content))
            sign_anew(bundle, made.releaser)
            refused(bundle, ".", recompute=False)
        (bundle / name).write_text(json.dumps(original))
    sign_anew(bundle, made.releaser)
    assert verify(bundle, recompute=False)


def with_plan(made: SignedRun, **changes: Any) -> SpendStatement:
    """The statement of site-0 with another plan; its own charges are those of the run."""
    known = SpendStatement.read((made.path / "statements/site-0.json").read_bytes(), what="it")
    return replace(known, plan=replace(known.plan, **changes))


def test_epsilon_is_that_of_dp_accounting_for_steps_and_warm_start(made: SignedRun) -> None:
    statement = with_plan(made, sampling_rate=0.2, noise_multiplier=1.1, warm_start_noise_multiplier=4.0)
    statement = replace(statement, charges=(MOMENTS, *statement.charges))
    accountant = PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(1.1))
    accountant.compose(step, len(statement.charges) - 1)
    accountant.compose(dp_accounting.GaussianDpEvent(4.0))
    found = statement.epsilon()
    assert found.pld == pytest.approx(accountant.get_epsilon(statement.plan.delta), rel=1e-3)
    assert found.epsilon == max(found.pld, found.prv)


def test_repeated_moments_of_a_simulated_site_are_one_release_and_of_a_real_one_two(made: SignedRun) -> None:
    # Seeded noise repeats the release bit for bit when a simulation is interrupted and goes on.
    statement = with_plan(made, warm_start_noise_multiplier=5.0)
    once, twice = (replace(statement, charges=(MOMENTS,) * count) for count in (1, 2))
    assert twice.epsilon() == once.epsilon()
    assert once.epsilon().epsilon == pytest.approx(epsilon_of_gaussians(5.0, 1, statement.plan.delta), rel=1e-6)
    with pytest.raises(TrustError, match="charged more"):
        replace(twice, simulated=False).epsilon()


def test_a_run_without_privacy_says_so_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = signed_run(tmp_path / "runs/a", {"privacy.name": "none"}).release(tmp_path / "model")
    assert run(["verify", str(bundle)]) == 0
    assert "no privacy: epsilon is infinite" in capsys.readouterr().out
    assert "without differential privacy" in (bundle / "README.md").read_text()
    assert verify(bundle).line.endswith("no privacy; unaltered since")


def test_a_run_that_was_trained_on_a_gpu_is_released_with_its_own_settings(tmp_path: Path) -> None:
    # What sites signed is the digest of the settings as they were, device included.
    made = signed_run(tmp_path / "runs/a", {"compute.device": "cuda", "privacy.sampling-rate": 1.0})
    loaded = load_bundle(verify(made.release(tmp_path / "model")))
    assert next(loaded.generator.parameters()).device.type == "cpu"


def test_words_of_prompts_cannot_break_the_commands_of_the_card(tmp_path: Path) -> None:
    prompt = "a \"red\" circle of $(touch x) `y` it's"
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0}, prompts=[prompt])
    text = (made.release(tmp_path / "model") / "README.md").read_text()
    assert """fedcanvas generate 'a "red" circle of $(touch x) `y` it'"'"'s' --model .""" in text
    assert json.dumps([prompt]) in text


# ---- what a signed card may not say


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda card: card.update(federation="another"), "another federation than the run"),
        (lambda card: card["privacy"].update(adjacency="replace"), "another adjacency"),
        (lambda card: card.update(simulated=False), "another simulated"),
        (lambda card: card["privacy"].update(rounds=1), "another rounds than the plan"),
        (lambda card: card["privacy"].update(epsilon_max="3"), "an epsilon of the card is no number"),
        (lambda card: card["privacy"]["sites"]["site-0"].update(epsilon=True), "an epsilon of the card is no number"),
    ],
)
def test_a_card_that_says_otherwise_than_the_statements_is_refused_whoever_signed_it(
    bundle: Path, made: SignedRun, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    edit_card(bundle, change)
    sign_anew(bundle, SigningKey.generate())
    refused(bundle, said, recompute=False)


def test_a_smaller_epsilon_is_refused_where_it_is_computed_and_called_a_word_where_it_is_not(
    bundle: Path, made: SignedRun
) -> None:
    edit_card(bundle, lambda card: card["privacy"].update(epsilon_max=0.1))
    sign_anew(bundle, SigningKey.generate())
    refused(bundle, "the card's largest epsilon is not that of its sites")
    assert "epsilon 0.1 as its releaser says" in verify(bundle, recompute=False).line


def test_weights_that_the_sites_did_not_sign_for_are_refused(bundle: Path, made: SignedRun) -> None:
    charges, weights = charges_of(made.run.config), hashlib.sha256((bundle / WEIGHTS).read_bytes()).hexdigest()
    assert any("signed for none" in line for line in verify(bundle, recompute=False).trusted)
    for site in made.sites:
        kept = (made.path / f"statements/{site}.json").read_bytes()
        made.state(site, charges, weights=weights)
        shutil.copy(made.path / f"statements/{site}.json", bundle / "statements")
        (made.path / f"statements/{site}.json").write_bytes(kept)
    sign_anew(bundle, made.releaser)
    found = verify(bundle, recompute=False)
    assert any("Every site signed that these weights" in line for line in found.proved)
    assert not any("signed for none" in line for line in found.trusted)
    content = bytearray((bundle / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (bundle / WEIGHTS).write_bytes(content)
    sign_anew(bundle, SigningKey.generate())
    refused(bundle, "signed for other weights", recompute=False)


@pytest.mark.parametrize("where", ["name", "example", "file"])
def test_what_came_from_elsewhere_moves_no_cursor(
    bundle: Path, made: SignedRun, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "\x1b[8m\n  signed by  AAAA"
    if where == "file":
        (bundle / words).touch()
    else:
        edit_card(bundle, lambda card: card.update({where: words}))
        sign_anew(bundle, made.releaser)
    assert run(["verify", str(bundle)]) == 10
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert not any(line.startswith("  signed by") for line in err.splitlines())


# ---- what a release itself refuses


def test_a_charge_after_the_last_answer_that_came_does_not_keep_a_run_from_being_released(tmp_path: Path) -> None:
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0})
    charges = charges_of(made.run.config)
    more = (len(charges), 2, charges[-1][2], charges[-1][3], "b" * 64, "c" * 32)  # its answer was late, or none came
    made.state("site-1", [*charges, more])
    found = verify(made.release(tmp_path / "model"))
    assert found.statements["site-1"].steps > found.statements["site-0"].steps
    sites = found.card["privacy"]["sites"]
    assert sites["site-1"]["epsilon"] > sites["site-0"]["epsilon"]  # and it counts


def leaves(table: dict[str, Any], *above: str) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, value in table.items():
        found += leaves(value, *above, name) if isinstance(value, dict) and value else [(*above, name)]
    return found


def test_all_that_follows_from_settings_prompts_and_statements_is_compared(bundle: Path, made: SignedRun) -> None:
    """Whoever releases a model cannot say otherwise; what only they know is named by `verify`."""
    original = json.loads((bundle / "card.json").read_text())
    of_the_releaser = {
        ("fedcanvas",), ("name",), ("lock_digest",), ("warning",), ("sites_that_left",),
        ("public", "front_end_fingerprint"), *(place for place in leaves(original) if place[0] == "versions"),
    }  # fmt: skip
    for place in leaves(original):
        card = json.loads(json.dumps(original))
        inside = card
        for name in place[:-1]:
            inside = inside[name]
        value = inside[place[-1]]
        other = {bool: not value, int: 7, float: 0.123, str: "another", list: ["another"], type(None): 1.0}
        inside[place[-1]] = {"site-9": {}} if isinstance(value, dict) else other[type(value)]
        (bundle / "card.json").write_text(json.dumps(card))
        sign_anew(bundle, SigningKey.generate())
        if place in of_the_releaser:
            verify(bundle, recompute=False)
        else:
            refused(bundle, ".")
    trusted = " ".join(verify(sign_original(bundle, original), recompute=False).trusted)
    assert all(word in trusted for word in ("README.md", "versions", "lock", "front end", "sites that left"))


def sign_original(bundle: Path, card: dict[str, Any]) -> Path:
    (bundle / "card.json").write_text(json.dumps(card))
    sign_anew(bundle, SigningKey.generate())
    return bundle


@pytest.mark.parametrize("name", ["card.json", "config.json"])
def test_a_name_that_stands_twice_is_refused(bundle: Path, name: str) -> None:
    text = (bundle / name).read_text()
    (bundle / name).write_text('{"name": "first", "run": {},' + text.lstrip()[1:])
    sign_anew(bundle, SigningKey.generate())
    refused(bundle, "cannot be read", recompute=False)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [("", "there is no prompt"), ("a" * 600 + "\n", "has 600 characters"), ("x\n\ny\n", "is empty")],
    ids=["none", "long", "blank"],
)
def test_prompts_that_are_none_are_refused(bundle: Path, prompts: str, said: str) -> None:
    (bundle / "prompts.txt").write_text(prompts)
    sign_anew(bundle, SigningKey.generate())
    refused(bundle, said, recompute=False)


def test_a_copy_without_its_manifest_is_said_to_be_no_whole_one(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    refused(bundle, "no whole copy")
    with pytest.raises(BundleError, match="no whole copy"):
        Generator.load(bundle)
    assert Generator.load(bundle, unverified=True).unverified


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_is_not_even_read_unverified(bundle: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").write_text("a prompt of somebody else\n")
    (bundle / "prompts.txt").unlink()
    if kind == "link":
        (bundle / "prompts.txt").symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(bundle / "prompts.txt")  # a reader would wait for ever
    with pytest.raises(BundleError, match=r"prompts\.txt"):
        Generator.load(bundle, unverified=True)
    refused(bundle, "neither a file of a released model")


def test_what_does_not_verify_is_never_written(tmp_path: Path) -> None:
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0})
    made.state("site-1", charges_of(made.run.config), weights="d" * 64)
    with pytest.raises(BundleError, match="site site-1 signed for other weights"):
        made.release(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_fingerprint_is_compared_as_people_write_it_down(bundle: Path, made: SignedRun) -> None:
    key = fingerprint(made.releaser.public.raw)
    for written in (key, key.upper(), key.replace(" ", "-"), key.replace(" ", ""), f" {key}\n"):
        assert verify(bundle, releaser=written, recompute=False).releaser == key
    for written in ("", " ", key[:-1], key + "a"):
        with pytest.raises(BundleError, match="not by"):
            verify(bundle, releaser=written, recompute=False)


def test_a_simulated_model_says_everywhere_that_it_protects_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0})
    made.releaser.write(tmp_path / "key.pem")
    out = tmp_path / "model"
    assert run(["release", str(made.path), "--key", str(tmp_path / "key.pem"), "--out", str(out)]) == 0
    assert "do not share it if it was made of private data" in capsys.readouterr().err
    assert run(["verify", str(out)]) == 0
    said = "protects nobody's records"
    assert said in capsys.readouterr().out
    assert said in (out / "README.md").read_text()
    assert said in json.loads((out / "card.json").read_text())["warning"]
    real = signed_run(tmp_path / "federation/runs/a", {"privacy.sampling-rate": 1.0}, deployed=True)
    bundle = real.release(tmp_path / "real")
    assert not any(said in (bundle / name).read_text() for name in ("README.md", "card.json"))
    assert not any(said in line for line in verify(bundle, recompute=False).trusted)


def test_verify_names_the_code_of_the_sites_and_whether_it_is_what_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0})
    assert run(["verify", str(made.release(tmp_path / "model"))]) == 0
    assert f"{CODE[:16]}; another release than is installed here" in capsys.readouterr().out
    here = code_digest(Path(__file__).resolve().parents[1])
    for site in made.sites:
        made.state(site, charges_of(made.run.config), code_digest=here)
    assert run(["verify", str(made.release(tmp_path / "again"))]) == 0
    assert f"{here[:16]}, which is installed here" in capsys.readouterr().out


def test_a_runs_own_model_cannot_pass_for_a_verified_one(tmp_path: Path) -> None:
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0})
    card = made.path / "model/model.json"
    about = json.loads(card.read_text())
    honest = Generator.load(made.path).provenance["epsilon"]
    about["privacy"] = {"epsilon_max": 0.1, "delta": 1e-9, "unit": "example", "adjacency": "add/remove", "sites": {}}
    card.write_text(json.dumps(about))
    generator = Generator.load(made.path)
    assert not generator.verified
    assert generator.provenance["epsilon"] == honest != "0.1"
    assert Generator.load(made.release(tmp_path / "model")).verified


def test_what_is_not_whole_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was open when its site signed, and sites that the settings count and that are not heard of."""
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0})
    charges = charges_of(made.run.config)
    whole = verify(made.release(tmp_path / "whole"), recompute=False)
    assert any("takes no further charge" in line for line in whole.proved)
    assert "2 simulated sites" in whole.line
    assert not any("open" in line or "no other site" in line for line in whole.trusted)
    made.state("site-1", charges, closed=False)
    still_open = verify(made.release(tmp_path / "open"), recompute=False)
    assert not any("takes no further charge" in line for line in still_open.proved)
    assert any("site-1 charged no more" in line for line in still_open.trusted)
    (made.path / "statements/site-1.json").unlink()
    made.remember({"site-0": head_after(charges)})
    fewer = verify(made.release(tmp_path / "fewer"), recompute=False)
    assert "1 of 2 simulated sites" in fewer.line
    assert any("the settings name 2, 1 signed" in line for line in fewer.trusted)


def test_a_statement_of_many_thousand_charges_is_read_and_one_beyond_all_bounds_is_not(tmp_path: Path) -> None:
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0})
    charge = ("gradient", 1, "a" * 64, "0" * 32)
    many = [(place, 1, charge[0], charge[1], charge[2], f"{place:032x}") for place in range(1, 30_001)]
    made.state("site-0", many)
    content = (made.path / "statements/site-0.json").read_bytes()
    assert len(content) > 2**21
    assert len(SpendStatement.read(content, what="it").charges) == 30_000
    with pytest.raises(TrustError, match="it is longer than"):
        SpendStatement.read(content + b" " * 2**24, what="it")


def test_a_release_needs_each_sites_statement_up_to_its_last_answer(tmp_path: Path) -> None:
    made = signed_run(tmp_path / "runs/a", {"privacy.sampling-rate": 1.0})
    charges = charges_of(made.run.config)
    made.state("site-1", charges[:-1])
    with pytest.raises(BundleError, match="ends before the site's last answer"):
        made.release(tmp_path / "model")
    (made.path / "statements/site-1.json").unlink()
    with pytest.raises(BundleError, match="the statement of site site-1 is missing") as caught:
        made.release(tmp_path / "model")
    assert f"fedcanvas simulate --resume --out {made.path}" in str(caught.value.hint)
    made.remember({})
    with pytest.raises(BundleError, match="no site has answered"):
        made.release(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ---- between institutions: whose key each site's is


@pytest.fixture
def deployed(tmp_path: Path) -> SignedRun:
    return signed_run(tmp_path / "federation/runs/a", {"privacy.sampling-rate": 1.0}, deployed=True)


def test_a_federations_run_is_released_with_the_admissions_of_its_sites(
    deployed: SignedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A site that left since: its admission was ended, and its signature of then still counts.
    folder = deployed.path.parents[1]
    (folder / "revoked").mkdir()
    (folder / "sites/site-1.json").rename(folder / "revoked/site-1.json")
    bundle = deployed.release(tmp_path / "model")
    assert {path.name for path in (bundle / "admissions").iterdir()} == {"site-0.json", "site-1.json"}
    capsys.readouterr()
    assert run(["verify", str(bundle), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["simulated"] is False
    assert f"admitted by the federation with the fingerprint {told['federation']}" in " ".join(told["shown"])
    assert verify(bundle, recompute=False).line.startswith(f"{bundle}: signed by ")
    assert " 2 sites, " in verify(bundle, recompute=False).line


def test_a_statement_by_a_key_that_was_not_admitted_is_refused(deployed: SignedRun, tmp_path: Path) -> None:
    bundle = deployed.release(tmp_path / "model")
    charges = charges_of(deployed.run.config)
    impostor = SignedRun(deployed.path, deployed.releaser, {"site-0": SigningKey.generate()}, deployed.identity)
    site_states(impostor, bundle, charges)
    refused(bundle, "spend statement of site site-0 is not signed by the key")
    impostor.state("site-0", charges)
    with pytest.raises(BundleError, match="has the key that signed for site site-0"):
        deployed.release(tmp_path / "other")


def test_an_admission_by_another_identity_or_of_another_site_is_refused(deployed: SignedRun, tmp_path: Path) -> None:
    bundle = deployed.release(tmp_path / "model")
    own, name = (bundle / "admissions/site-0.json").read_bytes(), deployed.run.config.federation.name
    public = deployed.sites["site-0"].public
    foreign = canonical(admission(name, "site-0", public, SigningKey.generate()))
    (bundle / "admissions/site-0.json").write_bytes(foreign)
    sign_anew(bundle, deployed.releaser)
    refused(bundle, "is not signed by the key")
    assert deployed.identity is not None
    for federation, site in ((name, "site-7"), ("another", "site-0")):
        content = canonical(admission(federation, site, public, deployed.identity))
        (bundle / "admissions/site-0.json").write_bytes(content)
        sign_anew(bundle, deployed.releaser)
        refused(bundle, "the admission of site site-0 is of another site or federation")
    (bundle / "admissions/site-0.json").unlink()
    sign_anew(bundle, deployed.releaser)
    refused(bundle, "admissions and statements are not of the same sites")
    (bundle / "admissions/site-0.json").write_bytes(own)
    sign_anew(bundle, deployed.releaser)
    assert verify(bundle, recompute=False)


def test_real_sites_cannot_be_passed_off_as_simulated_ones_nor_the_other_way(
    deployed: SignedRun, tmp_path: Path
) -> None:
    bundle = deployed.release(tmp_path / "model")
    shutil.rmtree(bundle / "admissions")
    (bundle / "federation.json").unlink()
    sign_anew(bundle, deployed.releaser)
    refused(bundle, "is of a simulated site among real ones, or none")


def test_a_run_outside_its_federations_folder_needs_the_folders_name(deployed: SignedRun, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere/deep/a"
    shutil.copytree(deployed.path, moved)
    with pytest.raises(BundleError, match="is no federation's folder"):
        release(moved, tmp_path / "model", key=deployed.releaser)
    made = release(moved, tmp_path / "model", key=deployed.releaser, federation=deployed.path.parents[1])
    assert made.statements["site-0"].code_digest == CODE
