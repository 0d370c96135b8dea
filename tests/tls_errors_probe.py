"""`python tls_errors_probe.py CERTIFICATES [PRELOAD]`: does a broken TLS connection break another one?

Prints `broken` or `whole`. CERTIFICATES is a folder with ca.pem, cert.pem and key.pem. Standard library only:
it also runs in a container.
"""

from __future__ import annotations

import runpy
import socket
import ssl
import sys


def connected(folder: str) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """Return the two ends of a TLS connection over loopback; none of them blocks."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
    client = ssl.create_default_context(cafile=f"{folder}/ca.pem")
    client.check_hostname = False
    with socket.create_server(("127.0.0.1", 0)) as listener:
        end = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for each in (end, other):
        each.setblocking(False)
    ends = (
        server.wrap_socket(other, server_side=True, do_handshake_on_connect=False),
        client.wrap_socket(end, do_handshake_on_connect=False),
    )
    left = list(ends)
    while left:
        for each in list(left):
            try:
                each.do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                continue
            left.remove(each)
    return ends


def read(end: ssl.SSLSocket) -> str:
    """Read where nothing has been written; return what happened to the connection."""
    try:
        end.recv(100)
    except ssl.SSLWantReadError:
        return "whole"
    except OSError:
        return "broken"
    return "read something"


def main(folder: str, *preload: str) -> None:
    """Break a connection by writing to one that its other end has closed; read another."""
    for path in preload:
        # Dask loads a preload again for each server of a process.
        for _ in range(2):
            runpy.run_path(path)["dask_setup"](None)
    healthy, other = connected(folder)
    read(other)  # the session tickets
    mine, theirs = connected(folder)
    theirs.close()
    for _ in range(1000):
        try:
            mine.send(b"x" * 1000)
        except ssl.SSLWantWriteError:
            continue
        except OSError:
            break
    else:
        sys.exit("writing to a closed connection did not fail")
    print(read(healthy))


if __name__ == "__main__":
    main(*sys.argv[1:])
