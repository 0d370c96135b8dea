"""Keep a broken TLS connection from breaking the others of its process: a preload of schedulers and workers.

With OpenSSL 3.4 and later, a Python that can't write to a connection leaves the error in the thread's queue
(python/cpython#148594; Debian 13 has such a Python). The next read of any other connection takes the error
for its own. So with one worker that is killed, a scheduler would lose others, and Dask closes the nannies of
those for good. This empties the queue after each error. Python 3.9 and later.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import ssl
from collections.abc import Callable
from typing import Any

# Any event loop ends in these.
METHODS = ("do_handshake", "read", "send", "write", "unwrap")

logger = logging.getLogger("distributed.comm")


def dask_setup(_server: Any) -> None:
    """Change the connections of this process. A failure must not end a worker."""
    try:
        install()
    except Exception as error:
        logger.warning("A broken TLS connection may break others: %r", error)


def install() -> None:
    """Change the connections of this process, once."""
    # A context of its own: what Dask uses stays as it is.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name in METHODS:
        method = getattr(ssl.SSLSocket, name)
        if not hasattr(method, "empties_queue"):
            setattr(ssl.SSLSocket, name, _emptying(method, context))


def _emptying(method: Callable[..., Any], context: ssl.SSLContext) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return method(*arguments, **named)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError:
            empty_queue(context)
            raise

    call.empties_queue = True  # type: ignore[attr-defined]
    return call


def empty_queue(context: ssl.SSLContext) -> None:
    """Empty OpenSSL's queue of errors. Python has no function for it; it does so when it refuses a cipher."""
    with contextlib.suppress(ssl.SSLError):
        context.set_ciphers("NONE-OF-THEM")
