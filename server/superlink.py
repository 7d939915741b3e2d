"""What the server asks of Flower's SuperLink, over this machine's loopback: nodes, runs, and the Grid of a run.

The Control API knows no authentication, so the SuperLink listens on loopback and the proxy in front of it lets nothing
but sites' paths through (`server.deployment`). A Flower run lives as long as the process that serves it; ours, which
is on disk, goes on under another one (`server.worker`).

Uses parts of Flower 1.41 that are not public.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self, cast

import httpx
from flwr.common.constant import HEARTBEAT_PATIENCE, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import PullTaskInputRequest, PullTaskInputResponse, PushTaskOutputRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from shared.app_bundle import bundle_content, bundle_digest
from shared.flower_runtime import Runtime, WorkSource, loopback_retries

TAKE_SECONDS = 60.0  # a run that was started is handed out at once
POLL_SECONDS = 0.2
# The last: killed while it was told something, it came back and knows nothing of what was announced.
UNREACHABLE = (httpx.HTTPError, ConnectionError, ObjectPushError)


class EngineLost(Exception):
    """The SuperLink does not do its part; the run itself goes on under another Flower run."""


@dataclass(frozen=True)
class Node:
    """A site's SuperNode, as the SuperLink knows it.

    Attributes:
        key: PEM of its public key.
        seen: seconds since 1970 of its last sign of life; 0 for none.
    """

    id: int
    key: bytes
    online: bool
    seen: float


class SuperLink:
    """Use it as a context manager, in one thread."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._control = ControlHttpClient.from_server_address(
            server_address=runtime.address, insecure=False, root_certificates=runtime.authority,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()

    def nodes(self) -> list[Node]:
        found = self._control.ListNodes(ListNodesRequest())
        return [
            Node(
                node.node_id, node.public_key, node.status == NodeStatus.ONLINE,
                max(0.0, node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval),
            )
            for node in found.nodes_info if node.status != NodeStatus.UNREGISTERED
        ]  # fmt: skip

    def register(self, key: bytes, *, name: str) -> None:
        self._control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))

    def unregister(self, node: int) -> None:
        self._control.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def stop_runs(self) -> None:
        """Flower runs whose process is gone: nothing of them is handed out any more."""
        for run, about in self._control.ListRuns(ListRunsRequest()).run_dict.items():
            if about.status.status != "finished":
                with suppress(httpx.HTTPStatusError):  # it ended by itself in between
                    self._control.StopRun(StopRunRequest(run_id=run))

    @contextmanager
    def run(self) -> Iterator[Grid]:
        """The Grid of a new Flower run, which ends with the block; what a killed process left is ended first.

        Raises:
            EngineLost: the SuperLink does not hand the run out.
        """
        self.stop_runs()
        fab = Fab(bundle_digest(), bundle_content(), {})
        with ExitStack() as ending:
            run = self._control.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id
            ending.callback(_quietly, lambda: self._control.StopRun(StopRunRequest(run_id=run)))
            grid = HttpGrid(self.runtime.address, root_certificates=self.runtime.authority, token=self._take())
            grid._retry_invoker = loopback_retries()
            client = grid._runtime_client
            ending.callback(client.close)
            guarded = _WhileItLasts(client)
            grid._client = cast(RuntimeHttpClient, guarded)
            heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
            heartbeat.start()
            ending.callback(lambda: heartbeat.stop() if heartbeat.is_running else None)
            given: PullTaskInputResponse = client.PullTaskInput(PullTaskInputRequest())
            if given.run.run_id != run:
                raise EngineLost("the SuperLink handed out another run than the one that was started")
            TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, run
            TaskIdentity.node_id = given.context.node_id
            grid.set_run(run_from_proto(given.run))
            output = PushTaskOutputRequest(
                context=context_to_proto(context_from_proto(given.context)), sub_status=SubStatus.FAILED, details=""
            )

            def end() -> None:
                guarded.over = True
                grid._retry_invoker.max_tries = 1
                client.PushTaskOutput(output)

            ending.callback(_quietly, end)
            yield grid
            output.sub_status = SubStatus.COMPLETED

    def _take(self) -> str:
        until = time.monotonic() + TAKE_SECONDS
        with WorkSource(self.runtime, TaskType.SERVER_APP) as source:
            while time.monotonic() < until:
                if (token := source.take()) is not None:
                    return token
                time.sleep(POLL_SECONDS)
        raise EngineLost("the SuperLink does not hand out the run: its log is in logs/superlink.log")


class _WhileItLasts:
    """A run's client, for threads that may still wait for an answer when the run is over.

    Flower's client takes a token that has ended for a reason to end the whole process.
    """

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client, self.over = client, False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if self.over:
                raise EngineLost("the run is over")
            return method(*arguments, **named)

        return call


def _quietly(call: Callable[[], object]) -> None:
    """What is told to a SuperLink that may be gone, or has ended the run itself."""
    with suppress(*UNREACHABLE, RunNotRunningException):
        call()
