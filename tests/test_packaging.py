"""Container files: hardened as docs/deploy.md says, calling commands that exist, not run. Firewall rules: loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import command_lines
import pytest
import yaml

from server.federation import AUTHORITY
from shared.supervisor import STOP_SECONDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGING = ROOT / "packaging"
DOCKERFILE = (PACKAGING / "container/Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((PACKAGING / "container/compose.yaml").read_text(encoding="utf-8"))
NFT = (PACKAGING / "nftables/fedcanvas.nft").read_text(encoding="utf-8")

# Of a service, by the Compose Specification: what is used here and its neighbours.
SERVICE_KEYS = {
    "annotations", "build", "cap_add", "cap_drop", "command", "container_name", "cpus", "depends_on", "deploy",
    "devices", "dns", "entrypoint", "env_file", "environment", "expose", "extra_hosts", "gpus", "group_add",
    "healthcheck", "hostname", "image", "init", "ipc", "labels", "logging", "mem_limit", "mem_reservation",
    "memswap_limit", "network_mode", "networks", "pid", "pids_limit", "platform", "ports", "privileged", "profiles",
    "pull_policy", "read_only", "restart", "runtime", "secrets", "security_opt", "shm_size", "stop_grace_period",
    "stop_signal", "sysctls", "tmpfs", "tty", "ulimits", "user", "userns_mode", "volumes", "working_dir",
}  # fmt: skip
BUILD_KEYS = {"args", "context", "dockerfile", "labels", "network", "platforms", "pull", "secrets", "tags", "target"}
HEALTH_KEYS = {"disable", "interval", "retries", "start_interval", "start_period", "test", "timeout"}
NAMESPACES = ["--map-root-user", "--net", "--mount", "--"]
VOLUME_KEYS = {"bind", "read_only", "source", "target", "tmpfs", "type", "volume"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(keyword, rest) of each of a Dockerfile, in order; continued lines are joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage to what it is built from and its own instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    name = ""
    for word, rest in instructions(DOCKERFILE):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = (base, [])
        elif name:
            found[name][1].append((word, rest))
    return found


def lineage(target: str) -> list[tuple[str, str]]:
    """All instructions that make the image `target`, in order."""
    known = stages()
    base, own = known[target]
    return [*(lineage(base) if base in known else []), *own]


# ---- the images


def test_the_base_has_an_exact_tag_or_a_digest_and_no_stage_another_base() -> None:
    (base,) = [rest for word, rest in instructions(DOCKERFILE) if word == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(r"BASE=python:(3\.11\.\d+-slim-\w+)(@sha256:[0-9a-f]{64})?", base)
    assert "latest" not in " ".join(rest for _, rest in instructions(DOCKERFILE))
    known = list(stages())
    for place, (base, _) in enumerate(stages().values()):
        assert base == "${BASE}" or base in known[:place]


@pytest.mark.parametrize("target", ["server", "site"])
def test_an_image_runs_as_nobody_in_particular_and_holds_no_installer(target: str) -> None:
    made = lineage(target)
    user = [rest for word, rest in made if word == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    assert ("ENTRYPOINT", '["fedcanvas"]') in made
    runs = " ".join(rest for word, rest in made if word == "RUN")
    assert "pip uninstall --yes setuptools wheel pip" in runs
    assert "apt-get" not in runs
    assert [rest for word, rest in made if word == "COPY"] == [f"--from=build-{target} /opt/fedcanvas /opt/fedcanvas"]
    (command,) = [json.loads(rest) for word, rest in made if word == "CMD"]
    command_lines.check(command)


def test_nothing_is_fetched_but_pinned_packages_and_nothing_is_copied_but_code() -> None:
    words = [word for word, _ in instructions(DOCKERFILE)]
    assert "ADD" not in words
    installs = [rest for word, rest in instructions(DOCKERFILE) if word == "RUN" and " install " in rest]
    assert len(installs) == 2
    assert all("-c constraints.txt" in rest for rest in installs)
    assert not re.search(r"\b(curl|wget|git|npm)\b", DOCKERFILE)
    copied = " ".join(rest for word, rest in lineage("build-server") if word == "COPY").split()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert {name.rstrip("*") for name in packages["find"]["include"]} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    ignored = (PACKAGING / "container/Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[1] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    assert kept == {name for name in copied if not name.startswith("./")}


# ---- compose.yaml


@pytest.mark.parametrize("name", ["server", "site"])
def test_a_service_of_the_compose_file_is_hardened(name: str) -> None:
    service: dict[str, Any] = COMPOSE["services"][name]
    assert set(service) <= SERVICE_KEYS
    assert set(service["build"]) <= BUILD_KEYS
    assert set(service["healthcheck"]) <= HEALTH_KEYS
    assert all(set(volume) <= VOLUME_KEYS for volume in service["volumes"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert 0 < service["pids_limit"] <= 512
    assert re.fullmatch(r"\d+g", service["mem_limit"])
    assert service["ulimits"] == {"core": 0}
    assert service["restart"] == "unless-stopped"
    assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"]
    assert {"noexec", "nosuid", "nodev"} <= set(service["tmpfs"][0].partition(":")[2].split(","))
    assert service["user"] in [rest for word, rest in lineage(name) if word == "USER"]
    assert 60 * float(service["stop_grace_period"].removesuffix("m")) >= STOP_SECONDS
    for key in ("privileged", "network_mode", "pid", "ipc", "devices", "cap_add"):
        assert key not in service
    assert not any("docker.sock" in volume["source"] for volume in service["volumes"])


def test_the_compose_file_has_no_keys_but_those_of_the_specification() -> None:
    assert set(COMPOSE) == {"name", "x-hardened", "services", "networks"}


@pytest.mark.parametrize("name", ["server", "site"])
def test_a_service_starts_by_a_command_that_exists_in_a_folder_that_is_mounted(name: str) -> None:
    service = COMPOSE["services"][name]
    command_lines.check(service["command"])
    assert "--foreground" in service["command"]
    mounted = [volume["target"] for volume in service["volumes"]]
    assert any(service["command"][2].startswith(place) for place in mounted)
    assert service["build"] == {"context": "../..", "dockerfile": "packaging/container/Dockerfile", "target": name}


def test_only_the_server_has_a_port_and_a_site_cannot_change_its_data() -> None:
    server, site = COMPOSE["services"]["server"], COMPOSE["services"]["site"]
    assert server["ports"] == ["9443:9443"]
    assert "ports" not in site
    assert [v["target"] for v in site["volumes"] if not v.get("read_only")] == ["/site", "/lineages"]


def healthy(name: str) -> str:
    """The Python of a health check."""
    kind, program, option, code = COMPOSE["services"][name]["healthcheck"]["test"]
    assert (kind, program, option) == ("CMD", "python", "-c")
    compile(code, name, "exec")
    return str(code)


def test_the_servers_health_check_asks_its_proxy_and_trusts_its_authority_alone() -> None:
    assert 'r.urlopen("https://localhost:9443/health"' in healthy("server")
    assert f'cafile="/operator/federation/{AUTHORITY}"' in healthy("server")


@pytest.mark.parametrize(
    ("worker", "connection", "code"),
    [
        ({"since": "", "answers": ""}, {"state": "connected"}, 0),
        ({"since": "", "answers": ""}, {"state": "refused"}, 1),
        (None, {"state": "connected"}, 1),
        (None, None, 1),
    ],
)
def test_the_sites_health_check_follows_its_status(
    worker: object, connection: object, code: int, tmp_path: Path
) -> None:
    status = tmp_path / "fedcanvas"
    about = json.dumps({"worker": worker, "connection": connection})
    status.write_text(f"#!/bin/sh\n[ \"$*\" = 'client status /site --json' ] && echo '{about}'\n", encoding="utf-8")
    status.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", healthy("site")], env=environment, capture_output=True, timeout=60)
    assert done.returncode == code, done.stderr


# ---- nftables


def test_the_firewall_limits_the_servers_port_and_opens_nothing() -> None:
    code = "\n".join(line.partition("#")[0] for line in NFT.splitlines())
    assert code.count("{") == code.count("}")
    assert "define port = 9443" in code
    assert "policy accept" in code
    declared, used = set(re.findall(r"\bset (\w+) \{", code)), set(re.findall(r"@(\w+)", code))
    assert used == declared - {"partners4", "partners6"}  # those of partners are named in comments
    assert all(line.strip().endswith("drop") for line in code.splitlines() if "@" in line)
    # Replaced as a whole, and never flushed with what other tables hold.
    assert re.search(r"^table inet fedcanvas\ndelete table inet fedcanvas\n", code, flags=re.MULTILINE)
    assert "flush" not in code


def activated() -> tuple[str, str]:
    """The block about local users as it is written, and without the comment signs."""
    *_, block = re.findall(r"(?:^    # .*\n)+", NFT, flags=re.MULTILINE)
    return block, re.sub(r"^    # ", "    ", block, flags=re.MULTILINE)


def test_the_rule_about_local_users_is_whole_once_it_is_activated() -> None:
    _, code = activated()
    assert code.count("{") == code.count("}")
    assert "type filter hook output" in code  # where the kernel still knows whose packet it is: nft(8), meta skuid
    assert re.search(r'oifname "lo" tcp dport \d+ meta skuid != \{ root, fedcanvas \} .*reject', code)


def can_load_rules() -> bool:
    if os.environ.get("CI"):
        return True  # there it is no excuse
    if not shutil.which("nft") or not shutil.which("ip"):
        return False
    return subprocess.run(["unshare", *NAMESPACES, "nft", "list", "tables"], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_load_rules(), reason="needs nftables")
def test_the_kernel_drops_what_the_rules_forbid_and_nothing_else(tmp_path: Path) -> None:
    commented, code = activated()
    code = code.replace("{ root, fedcanvas }", "{ root }")  # a user of that name may not be here
    (tmp_path / "local.nft").write_text(NFT.replace(commented, code))
    rules = [str(PACKAGING / "nftables/fedcanvas.nft"), str(tmp_path / "local.nft")]  # the second replaces the first
    scene = [sys.executable, str(ROOT / "tests/firewalled_server.py"), *rules]
    done = subprocess.run(["unshare", *NAMESPACES, *scene], check=True, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    assert found.pop("runtime, another user", 0) == 0
    # A token comes a second while it is tried.
    assert 60 <= found.pop("one after another") <= 70
    assert 60 <= found.pop("of one network, one after another") <= 70
    assert found.pop("of the same network") <= 3
    assert found == {
        "without rules": 80, "at once": 32, "from another address": 5, "of another network": 5, "over loopback": 80,
        "runtime, the server's user": 5,
    }  # fmt: skip
