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
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli import flower_supernode

from shared.flower_runtime import outlive_broken_tls

ENDED = 1  # exit code
ERROR = 40  # a level of Flower's log


def node_retries() -> RetryInvoker:
    """Flower's own, which wait longer and longer, up to 20 s."""
    return outlive_broken_tls(make_simple_http_retry_invoker())


def main() -> None:
    """Until SIGTERM; the options are those of `flower-supernode`."""
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
