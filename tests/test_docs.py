"""What the documents say is true: generated pages are current, links and tests and commands that are named exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from types import ModuleType

import command_lines
import pytest

from client.policy import SitePolicy
from shared.config import RunConfig, flatten_table
from shared.privacy.plan import make_plan
from shared.records import RefusalCode

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Privacy rules that this release keeps, some in part, by number; the table in docs/privacy.md has a test for each.
RULES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, 19, 20, 21, 25, 26]


@cache
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current() -> None:
    result = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, f"run `make docs`: {result.stdout}{result.stderr}"


def test_the_file_map_of_the_readme_names_every_file_of_the_tree_and_no_other() -> None:
    start, end = README.index(generate().MAP_START), README.index(generate().MAP_END)
    mapped = set(re.findall(r"\]\(([^)]+)\)", README[start:end]))
    expected = {
        str(path.relative_to(ROOT))
        for folder in ("benchmarks", "client", "docs", "server", "shared", "simulations", "tests")
        for kind in ("py", "md")
        for path in (ROOT / folder).rglob(f"*.{kind}")
        if path.name != "__init__.py"
    }
    assert mapped == expected


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_in_code_marks_exists(page: Path) -> None:
    pattern = r"`((?:shared|client|server|simulations|tests|docs|benchmarks)/[\w/.]+)`"
    named = re.findall(pattern, page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).exists()]


def commands(text: str) -> list[list[str]]:
    """Every `fedcanvas ...` line in a code block of `text`, without its comment and its [optional] marks."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("fedcanvas ")]


@pytest.mark.parametrize("command", commands(README), ids=" ".join)
def test_every_command_in_the_readme_exists_with_its_options(command: list[str]) -> None:
    known = set(generate().command_names())
    name = " ".join(command[1:3]) if " ".join(command[1:3]) in known else command[1]
    text = generate().help_text(name)
    options = [word for word in command[2:] if word.startswith("-")]
    assert not [option for option in options if not re.search(rf"(?<![\w-]){re.escape(option)}\b", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`make ([a-z-]+)", text) + re.findall(r"^make ([a-z-]+)", text, flags=re.MULTILINE)
    assert set(named) <= targets


def privacy_table() -> dict[int, str]:
    """Number of each rule to the tests that its row names."""
    text = (ROOT / "docs/privacy.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", text, flags=re.MULTILINE)
    return {int(number): tests for number, tests in rows}


@cache
def functions(file: str) -> set[str]:
    """Of a file of tests."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("rule", RULES)
def test_every_privacy_rule_of_this_release_names_tests_that_exist(rule: int) -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", privacy_table().get(rule, ""))
    assert named, f"rule {rule} names no test"
    for file, test in named:
        assert test in functions(file), f"{file}::{test}"


def test_the_mutations_page_names_tests_that_exist() -> None:
    text = (ROOT / "docs/mutations.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", text))
    assert len(named) > 40
    for file, test in sorted(named):
        assert test in functions(file), f"{file}::{test}"


def test_the_reference_epsilons_in_the_privacy_page_are_those_of_its_test() -> None:
    # One table of numbers in two places: a change of either shows.
    text = (ROOT / "docs/privacy.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_acc*.py")))
    figures = re.findall(r"^\| q = ([\d.]+), sigma = ([\d.]+), ([\d,]+) steps \|", text, flags=re.MULTILINE)
    assert len(figures) >= 3
    for q, sigma, steps in figures:
        assert q in source
        assert sigma in source
        assert re.search(steps.replace(",", "[_,]?"), source), steps


def test_terms_of_the_glossary_are_there_once_and_the_avoided_words_are_not_in_our_names() -> None:
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    words = [row.split("|")[1].strip() for row in text.splitlines() if row.startswith("| ")][1:]
    assert len(words) == len(set(words))
    assert {"site", "caption", "prompt", "update", "latents", "server round"} <= set(words)
    # Named in the project's rules of names: these mean something else here.
    avoided = {"n_steps", "noise_vector", "num_clients", "client_id", "vocab"}
    used = {
        node.id if isinstance(node, ast.Name) else node.arg
        for folder in ("shared", "client", "server", "simulations")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name | ast.arg)
    }
    assert not avoided & used


def test_the_exit_codes_in_the_commands_page_are_those_of_the_errors() -> None:
    rows = set(generate().exit_code_rows())
    assert len(rows) == 12
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert all(row in text for row in rows)


def test_the_changelog_has_a_privacy_heading_and_the_current_version_or_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert "### Privacy" in text
    assert f"## {version}" in text or "## Unreleased" in text


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert all(f"\n   {number}. " in text for number in range(1, 10))
    assert "END OF TERMS AND CONDITIONS" in text


DEPLOY = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
DOCKER = r"docker compose --file \S+ (?:run --rm|exec) \w+ (?:fedcanvas )?"


def typed(text: str) -> list[list[str]]:
    """The words after `fedcanvas` of every command line of `text`: in blocks, in a container, and inside a sentence."""
    blocks = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    found = re.findall(r"^(?:\$ )?fedcanvas (.+)$", blocks, flags=re.MULTILINE)
    found += re.findall(rf"^{DOCKER}(.+)$", blocks, flags=re.MULTILINE)
    sentences = re.findall(r"`fedcanvas ([^`]+ /[^`]+)`", text)
    return [shlex.split(line) for line in [*found, *sentences]]


@pytest.mark.parametrize("words", typed(DEPLOY), ids=" ".join)
def test_every_command_line_in_the_deployment_page_could_be_typed(words: list[str]) -> None:
    command_lines.check(words)


def test_every_command_that_the_deployment_page_names_exists() -> None:
    known = {f"fedcanvas {name}" for name in generate().command_names()}
    named = set(re.findall(r"fedcanvas (?:client|server) [a-z-]+|fedcanvas (?:plan|generate|evaluate)\b", DEPLOY))
    named |= {f"fedcanvas {name}" for name in re.findall(r"`((?:client|server) [a-z-]+)", DEPLOY)}
    assert len(named) > 20
    assert named <= known


def test_the_settings_in_the_deployment_page_make_a_run_within_a_sites_default_policy() -> None:
    (text,) = re.findall(r"^```toml\n(# run.toml\n.*?)^```", DEPLOY, flags=re.MULTILINE | re.DOTALL)
    flat = flatten_table(tomllib.loads(text))
    config = RunConfig.from_flat({**flat, "federation.name": "retina-2026", "federation.sites": 3})
    policy = SitePolicy(max_epsilon=8.0, delta=1e-5, federations=["retina-2026"])
    assert not list(policy.violations(config, make_plan(config), units=12_000))


def texts_of_the_code() -> list[str]:
    """Texts in the sources but docstrings; in those of f-strings a zero character stands for each value."""
    found = [f"refused: {code}" for code in RefusalCode]
    for path in (path for folder in ("client", "server", "shared") for path in (ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                found.append(node.value)
    return found


def test_every_message_in_the_troubleshooting_tables_is_in_the_code() -> None:
    # `...` stands for what differs from case to case.
    known = texts_of_the_code()
    tables = re.findall(r"^\| what it says \|.*?\n\n", f"{DEPLOY}\n", flags=re.MULTILINE | re.DOTALL)
    rows = [row for table in tables for row in table.strip().splitlines()[2:]]
    assert len(rows) > 50
    for row in rows:
        message = re.findall(r"`([^`]+)`", row.split("|")[1])[0]
        pattern = ".*".join(re.escape(part.strip()) for part in message.split("..."))
        assert any(re.search(pattern, text, flags=re.DOTALL) for text in known), message


def test_every_option_that_the_deployment_page_names_is_one_of_some_command() -> None:
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(--[a-z-]+)", DEPLOY)) <= set(re.findall(r"--[a-z-]+", text))
