"""Flower's SuperNode, started so that it outlives a broken connection: `python -m client.node OPTIONS`.

Flower 1.41 takes all that goes wrong with TLS, also a connection that ends in its handshake, for a reason to give up:
the message at hand is lost, and where the node was only asking for one, its loop ends and the process stays, online
for another minute and deaf for ever. Here only a certificate that is not trusted is such a reason, and the process
ends with its loop, so that whoever supervises it starts another.
Not here: which options (`client.deployment`).

Uses parts of Flower 1.41 that are not public.
"""

from __future__ import annotations

import os

from flwr.supercore import log
from flwr.supercore.retry import RetryInvoker, RetryState, make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli import flower_supernode

from shared.flower_runtime import outlive_broken_tls

ENDED = 1  # exit code
ERROR, WARNING = 40, 30  # levels of Flower's log


def node_retries() -> RetryInvoker:
    """Flower's own, which wait longer and longer, up to 20 s; a new reason for waiting is logged."""
    retries, last = outlive_broken_tls(make_simple_http_retry_invoker()), [""]
    goes_on = retries.on_backoff

    def tell(state: RetryState) -> None:
        if goes_on is not None:
            goes_on(state)
        if (words := str(state.exception)) != last[0]:
            last[0] = words
            log(WARNING, "The connection failed: %s", words)

    retries.on_backoff = tell
    return retries


def main() -> None:
    """Until SIGTERM; the options are those of `flower-supernode`."""
    assert "make_simple_http_retry_invoker" in vars(fleet_http_connection)
    vars(fleet_http_connection)["make_simple_http_retry_invoker"] = node_retries
    code: object = ENDED
    try:
        flower_supernode()  # comes back only when its loop has ended
        log(ERROR, "the node's loop has ended")
    except SystemExit as end:
        code = end.code
    except BaseException:
        log(ERROR, "the node's loop has ended", exc_info=True)
    finally:
        # Threads of Flower's would go on.
        os._exit(code if isinstance(code, int) else 0 if code is None else ENDED)


if __name__ == "__main__":
    main()
