"""TLS in one place: the context of every link that goes out and of every port that listens.

TLS 1.2 or newer, host names checked, never a question on a terminal. Certificates are read when a context is made, so a
renewed file is used from the next connection (outgoing) or the next start of the port (listening).

Source: protocols/packaging.md 3, trap 2 (where the roots are); protocols/settings.md, `tls` and `control.tls`.
"""

import os
import ssl
from pathlib import Path

import msgspec

from agent.core.errors import AgentError

# A frozen agent's OpenSSL knows the paths of the machine it was built on. Debian, Red Hat, SUSE, Alpine:
SYSTEM_ROOTS = (
    Path("/etc/ssl/certs/ca-certificates.crt"),
    Path("/etc/pki/tls/certs/ca-bundle.crt"),
    Path("/etc/ssl/ca-bundle.pem"),
    Path("/etc/ssl/cert.pem"),
)


class TlsSettings(msgspec.Struct, frozen=True):
    """What an outgoing link trusts, and what it shows. `key_file` may be left out when `cert_file` holds both.

    `pinned` holds the one certificate, the first in the file, that the other side has to have, by whatever name it was
    reached and whoever signed it.
    """

    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    pinned: Path | None = None


class TlsUnusable(AgentError):
    """A certificate, key or bundle of roots cannot be used."""


def find_roots(ca_file: Path | None = None) -> Path | None:
    """The file with the certificates to trust: that of the settings, `SSL_CERT_FILE`, or the first the system has."""
    if ca_file is not None:
        return ca_file
    named = os.environ.get("SSL_CERT_FILE")
    candidates = (Path(named), *SYSTEM_ROOTS) if named else SYSTEM_ROOTS
    return next((path for path in candidates if path.is_file()), None)


def client_context(tls: TlsSettings) -> "ssl.SSLContext":
    """For a link that goes out. Raises TlsUnusable: no roots, an unreadable file, a key of another certificate."""
    roots = tls.pinned or find_roots(tls.ca_file)
    if roots is None:
        raise TlsUnusable(
            "no trusted certificates: tls.ca_file and SSL_CERT_FILE are not set, and the system has none at"
            f" {', '.join(map(str, SYSTEM_ROOTS))}",
            remedy="Install the system's ca-certificates, or set tls.ca_file.",
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
    _restrict(context)
    if tls.pinned is not None:
        _pin(context, roots)
    else:
        _trust(context, roots)
    if tls.cert_file is not None:
        _show(context, tls.cert_file, tls.key_file)
    return context


def server_context(cert: Path, key: Path | None = None, client_ca: Path | None = None) -> "ssl.SSLContext":
    """For a port that listens; with `client_ca` only clients with a certificate of that authority come in.

    Raises TlsUnusable: a file cannot be read, key and certificate differ.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context)
    _show(context, cert, key)
    if client_ca is not None:
        _trust(context, client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _restrict(context: "ssl.SSLContext") -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])  # or a browser speaks HTTP/2, which the port does not


def _trust(context: "ssl.SSLContext", roots: Path) -> None:
    try:
        context.load_verify_locations(roots)
    except (OSError, ssl.SSLError) as err:
        raise TlsUnusable(
            f"{roots}: no certificates to trust: {_said(err)}", remedy="Name a file with certificates in PEM format."
        ) from err


def _pin(context: "ssl.SSLContext", cert: Path) -> None:
    """Trust this certificate alone: not its authority, whose others would pass now that no name is compared."""
    try:
        _, begin, rest = cert.read_text("ascii", "ignore").partition("-----BEGIN CERTIFICATE-----")
        body, end, _ = rest.partition("-----END CERTIFICATE-----")
        context.load_verify_locations(cadata=f"{begin}{body}{end}")
    except (OSError, ValueError) as err:
        raise TlsUnusable(f"{cert}: no certificate: {_said(err)}", remedy="Name a certificate chain, as PEM.") from err
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN


def _show(context: "ssl.SSLContext", cert: Path, key: Path | None) -> None:
    try:
        context.load_cert_chain(cert, key, password="")  # never asks for a passphrase on a terminal
    except (OSError, ssl.SSLError) as err:
        raise TlsUnusable(
            f"certificate {cert}, key {key or cert}: {_said(err)}",
            remedy="Name a certificate chain and its key, both PEM, without passphrase and readable by the agent.",
        ) from err


def _said(err: OSError | ValueError) -> str:
    """What the system or OpenSSL said, without a number."""
    return (err.strerror if isinstance(err, OSError) else "") or str(err)
