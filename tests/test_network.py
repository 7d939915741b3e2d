"""How a site reaches its server: which proxy is used, as httpx would, and whose certificates count beside."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from test_client_deployment import joined_site
from tls_servers import Pair, certificate

from client.deployment import programs
from client.network import Proxy, environment_of, proxy_of
from client.settings import SiteConfig
from shared.cli import run
from shared.errors import ConfigError, TrustError

AUTHORITY = certificate("authority of the federation")
BEYOND = "fl.example.test:9443"


def forget_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the machine that the tests run on."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def site_at(folder: Path, address: str, authority: Pair = AUTHORITY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ca.crt").write_text(authority.pem)
    return joined_site(folder / "sites", address=address, authority=folder / "ca.crt")[0]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_proxies(monkeypatch)


ENVIRONMENTS = [
    {},
    {"HTTPS_PROXY": "http://proxy:3128"},
    {"https_proxy": "proxy:3128"},
    {"HTTPS_PROXY": "http://wrong:1", "https_proxy": "http://proxy:3128"},
    {"ALL_PROXY": "http://proxy:3128"},
    {"HTTP_PROXY": "http://proxy:3128"},
    {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.org"},
    {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": ".example.org, other.net"},
    {"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "fl.example.org"},
    {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "ample.org"},
    {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "*"},
    {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "10.1.2.3"},
]


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=str)
@pytest.mark.parametrize("host", ["fl.example.org", "10.1.2.3"])
def test_which_proxy_is_used_is_what_httpx_would_do_and_what_it_then_does_as_it_is_told(
    environment: dict[str, str], host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SiteConfig(site_id="a", data="d", lineage="l")
    decided = proxy_of(config, f"{host}:443", environment)
    for told in (environment, environment_of(decided, environment)):
        with monkeypatch.context() as patched:
            for name, value in told.items():
                patched.setenv(name, value)
            assert httpx_proxy(host) == (("proxy", 3128) if decided is not None else None), told
    with monkeypatch.context() as patched:  # our own machine is never reached through one
        for name, value in environment_of(decided, environment).items():
            patched.setenv(name, value)
        assert httpx_proxy("127.0.0.1") is httpx_proxy("localhost") is None


def httpx_proxy(host: str) -> tuple[str, int] | None:
    """Where Flower's HTTP client would go for https://HOST instead."""
    with httpx.Client(verify=False) as client:  # nothing is asked; reading the authorities would take the time
        transport = client._transport_for_url(httpx.URL(f"https://{host}"))
        if transport is client._transport:
            return None
        url = transport._pool._proxy_url  # type: ignore[attr-defined]
        return url.host.decode(), url.port


def test_a_site_s_own_setting_counts_before_the_environment_and_a_network_needs_no_proxy() -> None:
    config = SiteConfig(site_id="a", data="d", lineage="l", https_proxy="http://own:3128")
    found = proxy_of(config, "10.1.2.3:443", {"HTTPS_PROXY": "http://proxy:1"})
    assert found is not None
    assert (found.host, found.port) == ("own", 3128)
    assert proxy_of(config, "10.1.2.3:443", {"NO_PROXY": "10.0.0.0/8"}) is None
    told = environment_of(None, {"NO_PROXY": "10.0.0.0/8,x.org"})
    assert told["NO_PROXY"] == told["no_proxy"] == "10.0.0.0/8,x.org,localhost,127.0.0.1"
    assert told["HTTPS_PROXY"] == ""


@pytest.mark.parametrize(
    "text", ["socks5://proxy:1080", "https://proxy:3128", "proxy", "http://proxy:0", "http://a b:1"]
)
def test_a_proxy_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form"):
        Proxy.parse(text, "HTTPS_PROXY")


def test_the_node_and_the_worker_are_told_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_at(tmp_path, BEYOND)
    monkeypatch.setenv("HTTPS_PROXY", "http://anna:tulips@proxy:3128")
    node, worker = programs(site)
    assert node.environment["https_proxy"] == node.environment["HTTPS_PROXY"] == "http://anna:tulips@proxy:3128"
    assert worker.environment["https_proxy"] == worker.environment["HTTPS_PROXY"] == ""
    for program in (node, worker):
        assert {"localhost", "127.0.0.1"} <= set(program.environment["NO_PROXY"].split(","))
        assert not any("tulips" in word for word in program.command)  # which others on the machine can read


def test_only_authorities_are_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = site_at(tmp_path, "localhost:443")
    for name, content in (
        ("leaf", certificate("server", by=AUTHORITY).pem),
        ("mixed", AUTHORITY.pem + certificate("server", by=AUTHORITY).pem),
        ("damaged", AUTHORITY.pem.replace("A", "B")),
        ("empty", ""),
    ):
        (tmp_path / name).write_text(content)
        assert run(["client", "trust", str(site), str(tmp_path / name)]) == TrustError.exit_code
        assert capsys.readouterr().err.startswith("error: ")
    assert run(["client", "trust", str(site), str(tmp_path / "absent")]) == TrustError.exit_code
    assert run(["client", "trust", str(site)]) == 2
    assert not (site / "keys/also-trusted.crt").exists()


def test_authorities_are_given_to_the_node_in_the_form_that_flower_reads(tmp_path: Path) -> None:
    site = site_at(tmp_path, "localhost:443")
    institution, second = certificate("Clínica: inspección TLS"), certificate("second")
    (tmp_path / "it.pem").write_text(f"subject: Clínica\n{institution.pem}issuer: Clínica\n{second.pem}")
    assert given(site) == [AUTHORITY.pem]
    assert run(["client", "trust", str(site), str(tmp_path / "it.pem")]) == 0
    assert given(site) == [AUTHORITY.pem, institution.pem, second.pem]
    (tmp_path / "it.pem").write_text(second.pem)
    assert run(["client", "trust", str(site), str(tmp_path / "it.pem")]) == 0
    assert given(site) == [AUTHORITY.pem, second.pem]
    for _ in range(2):
        assert run(["client", "trust", str(site), "--remove"]) == 0
        assert given(site) == [AUTHORITY.pem]


def given(site: Path) -> list[str]:
    """Certificates in the file that the node is started with."""
    command = list(programs(site)[0].command)
    text = Path(command[command.index("--root-certificates") + 1]).read_bytes().decode("ascii")
    end = "-----END CERTIFICATE-----\n"
    return [f"{part}{end}" for part in text.split(end)[:-1]]


def test_who_joins_may_name_an_authority_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    site = site_at(tmp_path, "localhost:443")  # for its data
    (tmp_path / "it.pem").write_text(certificate("institution").pem)
    assert run(["server", "init", "fed", "--name", "retina", "--address", "fl.example.org:443"]) == 0
    assert run(["server", "kit", "fed", "--site", "anna", "--out", "kit.zip"]) == 0
    assert run([
        "client", "join", "kit.zip", "new", "--data", str(site / "data.npz"), "--lineage", "scans", "--delta", "1e-3",
        "--max-epsilon", "8", "--store", "store", "--also-trust", "it.pem", "--yes",
    ]) == 0  # fmt: skip
    assert len(given(tmp_path / "new")) == 2
