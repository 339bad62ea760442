"""Encrypts connections, and checks who is at their other end."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fheconv.basics.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Holds the files of one side of a connection with TLS. All are PEM files.

    `certificate` is this side's own certificate, with those between it and its authority. `private_key` is
    its key, without a passphrase; None if it is in the same file. `authority` holds the certificates of those
    who sign the other side's. A server with an authority answers only clients with a certificate of it. A
    client without one believes the authorities that this machine knows.

    Raises `InvalidArgumentError` for files that cannot be read, or do not belong together.

    Example:
        >>> Tls(authority="ca.pem", certificate="me.pem", private_key="me.key")  # doctest: +SKIP
    """

    certificate: str | Path | None = None
    private_key: str | Path | None = None
    authority: str | Path | None = None

    def __post_init__(self) -> None:
        if self.private_key is not None and self.certificate is None:
            raise InvalidArgumentError("A private_key needs the certificate that it belongs to.")
        self.context()  # reads all files

    def context(self) -> ssl.SSLContext:
        """Return what Python's `ssl` needs to talk to a server."""
        try:
            context = ssl.create_default_context(cafile=self.authority)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.private_key, password=_refuse)
        except (OSError, ValueError) as error:  # ssl's errors are those of the system
            raise InvalidArgumentError(
                f"{self} cannot be used: {error}. Give PEM files: a certificate, its private key without a "
                "passphrase, and the certificates of an authority."
            ) from error
        return context

    def of_server(self) -> dict[str, Any]:
        """Return the options of uvicorn."""
        if self.certificate is None:
            raise InvalidArgumentError("A server with TLS needs a certificate.")
        options = {
            "ssl_certfile": self.certificate,
            "ssl_keyfile": self.private_key,
            "ssl_ca_certs": self.authority,
            "ssl_cert_reqs": ssl.CERT_NONE if self.authority is None else ssl.CERT_REQUIRED,
        }
        return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def failure(error: BaseException | None) -> ssl.SSLError | None:
    """Return the failure of TLS that led to an error, None if there was none.

    Example:
        >>> failure(OSError("no route to host")) is None
        True
    """
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error


def _refuse() -> str:
    raise ValueError("the private key has a passphrase")
