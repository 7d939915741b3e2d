"""Flower's own SuperLink and SuperNode as processes on loopback over TLS, for tests of what we put around them."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shared.app_bundle import bundle_files
from shared.flower_runtime import free_port
from shared.protection.certificates import issue_server_certificate, make_authority
from shared.protection.keys import write_private

ROOT = Path(__file__).resolve().parents[1]
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}  # fmt: skip
AT_COORDINATOR = "AT_COORDINATOR"  # in the environment of the coordinator's own processes, which may run its own code
TLS = ["--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]


def eventually(true: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"{what} never came about"
        time.sleep(0.1)


def listens(port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1)
        return tried.connect_ex(("127.0.0.1", port)) == 0


class Flower:
    """A SuperLink in `folder`, and what a test starts beside it; everything is ended with the context.

    Args:
        names: that its certificate is for, beside this machine's own.
    """

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self.port, self.names = folder, free_port(), names
        self._started = ExitStack()
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # Flower starts its own by name
        self.environment = {
            **os.environ, **QUIET, "FLWR_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "PATH": programs,
        }  # fmt: skip

    def __enter__(self) -> Flower:
        folder = self.folder
        (folder / "home").mkdir(parents=True)
        make_authority("test", certificate=folder / "ca.crt", key=folder / "ca.key")
        issue_server_certificate(
            ["localhost", "127.0.0.1", *self.names], authority=folder / "ca.crt", authority_key=folder / "ca.key",
            certificate=folder / "server.pem", key=folder / "server.key",
        )  # fmt: skip
        write_private(folder / "secret", secrets.token_hex(32).encode())
        (folder / "home/config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )
        self.start(
            "flower-superlink", *TLS, "--enable-supernode-auth", "--host", "127.0.0.1", "--port", str(self.port),
            "--database", str(folder / "state.db"), "--isolation", "process", "--superexec-auth-secret-file", "secret",
        )  # fmt: skip
        eventually(lambda: listens(self.port), "the SuperLink")
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()

    def start(
        self, program: str, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A program of this interpreter's, ended with the context; what it says is in `folder/PROGRAM-N.log`."""
        number = len(list(self.folder.glob(f"{Path(program).name}-*.log")))
        log = self._started.enter_context((self.folder / f"{Path(program).name}-{number}.log").open("wb"))
        command = [str(Path(sys.executable).with_name(program)) if "/" not in program else program, *arguments]
        process = subprocess.Popen(
            command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**self.environment, **(environment or {})},
        )  # fmt: skip
        self._started.callback(_end, process)
        return process

    def flwr(self, *arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("flwr")), *arguments]
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=60,
            env={**self.environment, AT_COORDINATOR: "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start_serverapps(self, **environment: str) -> None:
        """What runs ServerApps: Flower's own SuperExec."""
        self.start(
            "flower-superexec", "--runtime-api-address", f"127.0.0.1:{self.port}", "--root-certificates", "ca.crt",
            "--superexec-auth-secret-file", "secret", environment={**environment, AT_COORDINATOR: "1"},
        )  # fmt: skip

    def start_node(self, site: Path) -> int:
        """The SuperNode of a site, registered; the port where its tasks are handed out."""
        key, port = self.folder / f"node-{site.name}", free_port()
        subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)], check=True)
        self.flwr("supernode", "register", f"{key}.pub", "here")
        self.start(
            "flower-supernode", "--superlink", f"127.0.0.1:{self.port}", "--root-certificates", "ca.crt",
            "--auth-supernode-private-key", str(key), "--host", "127.0.0.1", "--port", str(port), *TLS,
            "--isolation", "process", "--superexec-auth-secret-file", "secret",
            "--node-config", f"site-dir='{site}'",
        )  # fmt: skip
        eventually(lambda: listens(port), "the SuperNode")
        return port

    def run(self, files: Mapping[str, bytes], *, name: str = "app") -> str:
        """Starts a run of the app of these files and returns what `flwr run` says."""
        app = self.folder / name
        app.mkdir()
        for file, content in files.items():
            (app / file).parent.mkdir(parents=True, exist_ok=True)
            (app / file).write_bytes(content)
        return self.flwr("run", str(app), "here", "--format", "json")


@contextmanager
def flower(folder: Path, *names: str) -> Iterator[Flower]:
    with Flower(folder, *names) as made:
        yield made


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


assert bundle_files()
