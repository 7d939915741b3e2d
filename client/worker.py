"""The process at a deployed site that answers messages: it takes tasks from the site's SuperNode and runs them itself.

Flower's own way is to unpack the bundle that the coordinator shipped and to import the ClientApp from it: whoever
ships the bundle then owns the site. Here nothing of a bundle is ever unpacked or imported (PRIVACY rule 25): its
SHA-256 must be that of this release's own bundle, or one that the site's policy names, and the app that runs is the
installed `client.app`, imported before the first task came. A message that came with another bundle is answered with
the refusal `release`, and the site's log says which bundle that was.

One long process instead of one for each message, so records and features stay in memory. When it dies, whoever
supervises it starts another; the ledger holds what was charged. Told to end, it answers its message first; while it
waits for one, it ends at once.
Not here: how work is asked for (`shared.flower_runtime`).
"""

from __future__ import annotations

import hashlib
import signal
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from flwr.app import Context
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from client.activity import note_activity
from client.app import app, refuse_bundle
from client.membership import open_channel
from client.policy import SitePolicy
from client.settings import SiteConfig, log_exception
from shared.app_bundle import bundle_digest
from shared.errors import ProtocolError
from shared.flower_runtime import Runtime, WorkSource

POLL_SECONDS = 0.2


class Ending:
    """Whether the worker was told to end, and whether it may at once."""

    def __init__(self) -> None:
        self.told = self.busy = False

    def tell(self, *_: object) -> None:
        """A handler of signals."""
        self.told = True
        if not self.busy:
            raise SystemExit(0)  # also out of a wait for a node that is not there


def work(site_dir: Path, runtime: Runtime, *, bundles: Collection[str], ending: Ending) -> None:
    """Takes and answers one task after another until told to end.

    Args:
        bundles: SHA-256 of bundles whose messages are answered, 64 hex digits each.
    """
    note_activity(site_dir)
    with WorkSource(runtime, TaskType.CLIENT_APP) as source:
        while not ending.told:
            token = source.take()
            if token is None:
                time.sleep(POLL_SECONDS)
                continue
            ending.busy = True
            while token is not None:
                token = _answer_task(site_dir, runtime, token, bundles, source)
            note_activity(site_dir)
            ending.busy = False


def _answer_task(
    site_dir: Path, runtime: Runtime, token: str, bundles: Collection[str], source: WorkSource
) -> str | None:
    """One message; the token of a newer one that came while this one's content did not.

    Whatever goes wrong is the site's own log's; what leaves is a reply or a code.
    """
    client = runtime.client_of_task(token, program="flwr-clientapp")
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    context: Context | None = None
    status, watched = "failed", _Watched(client, source)
    try:
        heartbeat.start()
        message, context, _, bundle = pull_task_input(cast(RuntimeHttpClient, watched))
        note_activity(site_dir, flower_run=message.metadata.run_id, group=message.metadata.group_id)
        digest = hashlib.sha256(bundle.content).hexdigest()
        known = digest in bundles
        reply = app(message=message, context=context) if known else refuse_bundle(message, site_dir, digest)
        push_message(client, reply, context)
        status = "completed"
    except (Exception, RunNotRunningException) as error:  # the latter is no Exception: the run was stopped meanwhile
        log_exception(site_dir, error)
    finally:
        if heartbeat.is_running:
            heartbeat.stop()
        try:
            push_task_output(client, context, status, details="")
        except (Exception, RunNotRunningException) as error:
            log_exception(site_dir, error)
        client.close()
    return watched.newer


class _Watched:
    """A client of the runtime that gives up waiting for a message's content when a newer message is handed out.

    A run that is stopped while the node receives a message of it leaves that message handed out for ever, without its
    content (Flower 1.41): whoever waits for it would answer nothing again. The node hands out the next message only
    when it is done with this one.
    """

    def __init__(self, client: RuntimeHttpClient, source: WorkSource) -> None:
        self._client, self._source = client, source
        self._lock = threading.Lock()  # parts of a message are asked for by several threads
        self._looked = time.monotonic()
        self.newer: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullObject(self, request: PullObjectRequest, **settings: Any) -> PullObjectResponse:  # noqa: N802
        found: PullObjectResponse = self._client.PullObject(request, **settings)
        if not found.object_available:
            self._look()
        return found

    def _look(self) -> None:
        with self._lock:
            if self.newer is None and time.monotonic() > self._looked + POLL_SECONDS:
                self._looked, self.newer = time.monotonic(), self._source.take()
            if self.newer is not None:
                raise ProtocolError("a message never came whole: its run was stopped; the next one is answered")


def main() -> None:
    """`python -m client.worker SITE_DIR`, until SIGTERM."""
    ending = Ending()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ending.tell)
    site_dir = Path(sys.argv[1])
    if open_channel(site_dir, SiteConfig.read(site_dir).site_id) is None:
        raise SystemExit(f"{site_dir} joined no federation: nothing that came over a network is answered")
    allowed = {bundle_digest(), *SitePolicy.read(site_dir).bundles}
    work(site_dir, Runtime.read(site_dir), bundles=allowed, ending=ending)


if __name__ == "__main__":
    main()
