"""TLS for the connection to a scheduler: the files, and what to do if it fails."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

from ami_builder.core.errors import UsageError

FILES = ("ca.pem", "cert.pem", "key.pem")
HOW = "use --tls FOLDER, with a folder from `ami-builder certificates`, and an address without tcp://"

_MOST_SECONDS = 10.0
"""For one handshake: a scheduler that takes longer is asked anyway, and its error has the reason."""
_NO_TLS = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")
"""OpenSSL's reasons when the answer is not TLS."""
_OTHER_CA = (18, 19, 20, 21)
"""OpenSSL's verify codes for a self-signed certificate, and for an issuer that is not known."""


def address(text: str, certificates: Path | None) -> str:
    """Return a scheduler's address, with tls:// if there are certificates.

    Raises UsageError for another scheme.
    """
    if certificates is None:
        return text
    scheme, separator, _ = text.rpartition("://")
    if not separator:
        return f"tls://{text}"
    if scheme != "tls":
        raise UsageError(f"{text}: {scheme}:// is without TLS", hint="with --tls, use tls:// or no scheme")
    return text


def connection(distributed: Any, scheme: str, certificates: Path | None) -> dict[str, Any]:
    """Return distributed's arguments for a connection. Raises UsageError for files that can't be used."""
    if certificates is None:
        security, source = distributed.Security(), "Dask's configuration (distributed.comm.tls)"
    else:
        ca, certificate, key = files(certificates)
        source = str(ca.parent)
        security = distributed.Security(
            tls_ca_file=str(ca),
            tls_client_cert=str(certificate),
            tls_client_key=str(key),
            require_encryption=True,
        )
    try:
        made: dict[str, Any] = security.get_connection_args("client")
    except OSError as wrong:  # ssl.SSLError is one
        raise UsageError(f"the certificates of {source} can't be used: {_text(wrong)}", hint=HOW) from wrong
    if scheme == "tls" and made["ssl_context"] is None:
        raise UsageError("tls:// needs certificates", hint=HOW)
    return made


def files(folder: Path) -> tuple[Path, ...]:
    """Return a client's files, in `folder` or in its folder client. Raises UsageError if one is missing."""
    if not folder.is_dir():
        raise UsageError(f"--tls {folder}: there is no such folder", hint=HOW)
    chosen = folder / "client" if (folder / "client").is_dir() else folder
    if missing := [name for name in FILES if not (chosen / name).is_file()]:
        raise UsageError(f"--tls {folder}: {chosen} has no {', '.join(missing)}", hint=HOW)
    return tuple(chosen / name for name in FILES)


def check(context: ssl.SSLContext | None, scheme: str, host: str, port: int, seconds: float) -> None:
    """Raise UsageError with the reason if a TLS scheduler and these certificates do not fit together.

    Dask itself would try again until its time is over, and not give the reason.
    """
    if scheme != "tls" or context is None:
        return
    where = f"tls://{host}:{port}"
    try:
        with (
            socket.create_connection((host, port), min(seconds, _MOST_SECONDS)) as plain,
            context.wrap_socket(plain) as encrypted,
        ):
            # In TLS 1.3 a refusal comes after the handshake. A scheduler sends first.
            encrypted.recv(1)
    except ssl.SSLCertVerificationError as wrong:
        why = "another CA issued it" if wrong.verify_code in _OTHER_CA else wrong.verify_message
        raise UsageError(
            f"{where}: the scheduler's certificate is refused: {why}",
            hint="use the ca.pem of the CA that issued the scheduler's certificate",
        ) from wrong
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return  # as `ssh -L` ends it when nothing listens at its other end
    except ssl.SSLError as wrong:
        if wrong.reason in _NO_TLS:
            raise UsageError(
                f"{where}: the scheduler does not use TLS", hint="use tcp:// and no --tls"
            ) from wrong
        raise UsageError(
            f"{where}: the scheduler refuses this certificate: {_text(wrong)}",
            hint="use a certificate of the scheduler's own CA that has not expired",
        ) from wrong
    except OSError:
        return  # nothing listens, or it is slow: distributed waits for it


def speaks_tls(host: str, port: int, seconds: float) -> bool:
    """Return whether a server answers a TLS handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), min(seconds, _MOST_SECONDS)) as plain,
            context.wrap_socket(plain),
        ):
            return True
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        return False  # it closes what it accepts, as a tunnel does whose other end is missing
    except ssl.SSLError as wrong:
        return wrong.reason not in _NO_TLS
    except OSError:
        return False


def _text(wrong: OSError) -> str:
    if isinstance(wrong, ssl.SSLError):
        return (wrong.reason or str(wrong)).lower().replace("_", " ")
    return wrong.strerror or str(wrong)
