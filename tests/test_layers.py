"""Who may import whom, where each heavy library lives, and that nothing that can run code is ever unpickled.

Read from the source with `ast`, so an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("client", "server", "shared", "simulations")

# package: the packages of ours that it may import beside itself.
MAY_IMPORT = {
    "shared": set(),
    "client": {"shared"},
    "server": {"shared"},
    "simulations": {"shared", "client", "server"},
    "benchmarks": {"shared", "client", "server", "simulations"},
    "docs": {"shared", "server", "simulations"},
}

# Inside a package the arrow points down this list; a module that is not named stands at the bottom.
LEVELS = {
    "client": [
        "client.cli", "client.deployment_cli", "client.doctor", "client.deployment", "client.worker", "client.status",
        "client.receipts", "client.spending", "client.app", "client.ownership", "client.query", "client.enrolment",
        "client.site", "client.gate",
    ],
    "server": [
        "server.cli", "server.serve_cli", "server.deployment_cli", "server.worker", "server.delivery", "server.app",
        "server.rounds", "server.cohort",
    ],
}

# A library that is slow to load, or that has to be trusted, is met in one place.
PLACES = {
    "flwr": {
        "client.app", "client.node", "client.worker", "server.app", "server.cohort", "server.delivery",
        "server.mailbox", "server.superlink", "server.worker", "shared.app_bundle", "shared.flower_runtime",
        "shared.records", "simulations.engines",
    },
    "ray": {"simulations.engines"},
    "opacus": {"shared.privacy"},
    "dp_accounting": {"shared.privacy"},
    "cryptography": {"shared.privacy", "shared.protection"},
    "cv2": {"shared.data", "simulations.shapes"},
    "transformers": {"shared.text", "shared.metrics"},
    "torch_fidelity": {"shared.metrics"},
    "torchvision": {"shared.metrics"},
    "sklearn": {"shared.metrics"},
    "matplotlib": {"server.charts", "server.sheet", "server.plan_cli"},
    "pydantic": {"shared.config", "client.settings", "client.policy", "server.serving"},
    "fastapi": {"server.serving"},
    "starlette": {"server.serving.app"},
    "uvicorn": {"server.serving.service"},
    "prometheus_client": {"server.serving.metrics"},
    "h11": {"server.serving.service"},
    "safetensors": {"shared.rundir", "shared.metrics"},
    "PIL": {
        "server.generator", "server.serving.app", "server.sheet", "server.onnx_generate", "server.onnx_generate_tokens",
    },
    "onnx": {"server.export"},
    "onnxruntime": {"server.export", "server.onnx_generate", "server.onnx_generate_tokens"},
    "tokenizers": {"server.export", "server.onnx_generate_tokens"},
}

# Reading weights or data runs no code: tensors are safetensors, everything else is JSON, TOML, PNG or plain arrays.
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "urllib", "requests"}
FORBIDDEN_CALLS = {"torch.save", "torch.hub.load", "torch.hub.load_state_dict_from_url", "eval", "exec", "os.system"}
FORBIDDEN_ARGUMENTS = {"allow_pickle", "trust_remote_code", "shell"}  # may only be written as False
# The one file of others' weights that exists only as a pickle: tensors are read from it and nothing is run.
MAY_LOAD = {"shared.metrics.inception": {"weights_only": "True"}}
# The published weights, whose digest is checked before anything reads them.
MAY_DOWNLOAD = {"shared.metrics.inception": {"hash_prefix": "PUBLISHED"}}
RESTRICTED_CALLS = {"torch.load": MAY_LOAD, "torch.hub.download_url_to_file": MAY_DOWNLOAD}


@cache
def modules() -> dict[str, ast.Module]:
    found = {}
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


@cache
def imports(tree: ast.AST) -> tuple[str, ...]:
    """Every module that is imported anywhere; `from a import b` gives `a` and, where it is one of ours, `a.b`."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            assert node.module
            found += [node.module]
            found += [name for alias in node.names if (name := f"{node.module}.{alias.name}") in modules()]
    return tuple(found)


def top(name: str) -> str:
    return name.partition(".")[0]


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_its_layer_allows(package: str) -> None:
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        (name, imported)
        for name, tree in modules().items()
        if top(name) == package
        for imported in imports(tree)
        if top(imported) in {*MAY_IMPORT, "tests"} - allowed
    ]
    assert not wrong


def test_only_two_tables_name_a_module_of_another_layer_in_a_text() -> None:
    # Lazy tables hold "module:attribute" texts, which are imports too. The command line has one; the other is how a
    # command at a site's machine asks about private data, and is met at the call only.
    lazy = re.compile(rf"({'|'.join(OURS)})(\.\w+)*(:\w+)?")
    wrong = [
        (name, node.value)
        for name, tree in modules().items()
        if top(name) in OURS and name not in ("shared.cli", "shared.private_data")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if lazy.fullmatch(node.value) and "." in node.value
        if top(node.value) not in MAY_IMPORT[top(name)] | {top(name)}
    ]
    assert not wrong


@pytest.mark.parametrize("package", LEVELS)
def test_inside_a_package_the_arrow_points_from_the_app_to_the_learning(package: str) -> None:
    levels = LEVELS[package]

    def level(name: str) -> int:
        return levels.index(name) if name in levels else len(levels)

    wrong = [
        (name, imported)
        for name, tree in modules().items()
        if top(name) == package and name != package
        for imported in imports(tree)
        if top(imported) == package and imported in levels and level(imported) <= level(name)
    ]
    assert not wrong


def test_no_two_modules_import_each_other() -> None:
    def at_load(tree: ast.Module) -> Iterator[str]:
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):  # not in functions, not under TYPE_CHECKING
                yield from imports(node)

    # A package's __init__ may gather its own modules, which then import the package: Python resolves that.
    graph = {
        name: {found for found in at_load(tree) if found in modules() and not name.startswith(found)}
        for name, tree in modules().items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


@pytest.mark.parametrize("library", PLACES)
def test_a_heavy_library_is_imported_in_its_one_place(library: str) -> None:
    found = {name for name, tree in modules().items() if library in map(top, imports(tree)) and top(name) in OURS}
    assert {name for name in found if not within(name, PLACES[library])} == set()


def test_nothing_is_unpickled_downloaded_or_evaluated() -> None:
    wrong = []
    for name, tree in modules().items():
        wrong += [(name, found) for found in imports(tree) if top(found) in FORBIDDEN_IMPORTS]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
                wrong.append((name, ast.unparse(node)))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in RESTRICTED_CALLS:
                allowed = RESTRICTED_CALLS[ast.unparse(node.func)].get(name)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if allowed is None or not allowed.items() <= given.items():
                    wrong.append((name, ast.unparse(node)))
            if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_ARGUMENTS and ast.unparse(node.value) != "False":
                wrong.append((name, f"{node.arg}={ast.unparse(node.value)}"))
    assert not wrong


def test_no_file_is_a_drawer_for_everything() -> None:
    nouns = {"utils", "util", "common", "base", "helpers", "misc"}
    assert not [name for name in modules() if nouns & set(name.split("."))]


def test_every_file_opens_by_saying_what_it_promises() -> None:
    assert not [name for name, tree in modules().items() if tree.body and not ast.get_docstring(tree)]


@cache
def loaded_after(code: str) -> set[str]:
    """Names of the modules that a fresh process has loaded after `code`."""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_app_of_a_site_loads_no_server_code() -> None:
    loaded = loaded_after("import client.app")
    assert not [name for name in loaded if top(name) in ("server", "simulations")]
    assert "client.site" in loaded


def test_nothing_at_a_site_measures_quality() -> None:
    """PRIVACY rule 16: no code path from private data to a metric."""
    loaded = loaded_after("import client.app")
    assert not [name for name in loaded if name.startswith("shared.metrics")]
    # A person's charged question about private data is the one exception, and no message reaches it.
    assert not {"client.query", "client.ownership", "shared.private_data"} & loaded
    at_a_site = {name: set(imports(tree)) for name, tree in modules().items() if top(name) == "client"}
    assert not [name for name, imported in at_a_site.items() if any(i.startswith("shared.metrics") for i in imported)]


def test_the_command_line_loads_nothing_heavy_until_it_is_needed() -> None:
    loaded = loaded_after("import shared.cli")
    assert not {top(name) for name in loaded} & {"torch", "flwr", "opacus", "cv2", "transformers", "matplotlib", "ray"}


def test_reading_a_released_model_loads_neither_flower_nor_what_exports_it() -> None:
    loaded = loaded_after("import fedcanvas")
    assert not {top(name) for name in loaded} & {"flwr", "ray", "opacus", "onnx", "onnxscript", "onnxruntime", "cv2"}


def test_asking_about_private_data_loads_no_code_of_a_site_until_it_is_done() -> None:
    loaded = loaded_after("import shared.private_data")
    assert not {top(name) for name in loaded} & {"client", "torch"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import a.b", ["a.b"]),
        ("def f():\n    from shared import errors", ["shared", "shared.errors"]),
        ("from shared.errors import DataError", ["shared.errors"]),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, found: list[str]) -> None:
    assert list(imports(ast.parse(source))) == found
