"""TLS contexts: which roots are trusted, what is refused, what a handshake ends in."""

import ssl
from pathlib import Path

import pytest

from agent.core import tls
from agent.core.tls import TlsSettings, TlsUnusable, client_context, find_roots, server_context
from tests.certificates import Issued, authority, issue


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str = "127.0.0.1") -> ssl.SSLObject:
    """A handshake in memory; the server's end."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return ends[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ca(folder: Path) -> Issued:
    return authority(folder)


@pytest.fixture(scope="module")
def server(ca: Issued, folder: Path) -> Issued:
    return issue(ca, folder, "server")


def test_the_roots_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting, named, first, second = (tmp_path / name for name in ("setting", "named", "first", "second"))
    monkeypatch.setattr(tls, "SYSTEM_ROOTS", (first, second))
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    assert find_roots() is None
    with pytest.raises(TlsUnusable, match=r"none at .*first, .*second. Install the system's ca-certificates"):
        client_context(TlsSettings())
    for path in (second, first, named):
        path.touch()
        monkeypatch.setenv("SSL_CERT_FILE", str(named))
        assert find_roots() == path
    assert find_roots(setting) == setting  # even when it is not there: what is set must hold


def test_a_server_is_trusted_by_its_authority_and_its_name(ca: Issued, server: Issued, folder: Path) -> None:
    client = client_context(TlsSettings(ca_file=ca.cert))
    offered = server_context(server.cert, server.key)
    assert shake_hands(client, offered).version() in ("TLSv1.2", "TLSv1.3")
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        shake_hands(client, offered, "127.0.0.2")
    stranger = authority(folder, "stranger")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(client_context(TlsSettings(ca_file=stranger.cert)), offered)


def test_one_certificate_can_be_the_only_one_whatever_its_name(ca: Issued, folder: Path) -> None:
    ours, other = (issue(ca, folder, name, "DNS:lab-07") for name in ("ours", "other"))
    chain = folder / "chain.pem"
    chain.write_bytes(ours.key.read_bytes() + ours.cert.read_bytes() + ca.cert.read_bytes())
    client = client_context(TlsSettings(pinned=chain))
    assert shake_hands(client, server_context(chain)).version() == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(client, server_context(other.cert, other.key))
    for bad in (folder / "absent.pem", ours.key):
        with pytest.raises(TlsUnusable, match=f"{bad}: no certificate: "):
            client_context(TlsSettings(pinned=bad))


def test_less_than_tls_1_2_is_not_spoken(ca: Issued, server: Issued) -> None:
    for context in (client_context(TlsSettings(ca_file=ca.cert)), server_context(server.cert, server.key)):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_with_a_client_ca_only_its_clients_come_in(ca: Issued, server: Issued, folder: Path) -> None:
    mutual = server_context(server.cert, server.key, client_ca=ca.cert)
    laptop = issue(ca, folder, "laptop")
    ours = client_context(TlsSettings(ca_file=ca.cert, cert_file=laptop.cert, key_file=laptop.key))
    shown = shake_hands(ours, mutual).getpeercert()
    assert shown is not None
    assert shown["subject"] == ((("commonName", "laptop"),),)
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake_hands(client_context(TlsSettings(ca_file=ca.cert)), mutual)


def test_key_and_certificate_may_be_one_file(ca: Issued, server: Issued, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_bytes(server.cert.read_bytes() + server.key.read_bytes())
    shake_hands(client_context(TlsSettings(ca_file=ca.cert)), server_context(both))


def test_files_that_cannot_be_used_are_named(ca: Issued, server: Issued, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    for bad in (empty, tmp_path / "absent.pem"):
        with pytest.raises(TlsUnusable, match=f"{bad}: no certificates to trust: "):
            client_context(TlsSettings(ca_file=bad))
        with pytest.raises(TlsUnusable, match=f"certificate {bad}, key {bad}: "):
            server_context(bad)
        with pytest.raises(TlsUnusable, match=f"{bad}: no certificates to trust: "):
            server_context(server.cert, server.key, client_ca=bad)
    with pytest.raises(TlsUnusable, match="KEY_VALUES_MISMATCH"):
        server_context(server.cert, ca.key)
    for names in (TlsSettings(tmp_path / "absent.pem"), TlsSettings(pinned=tmp_path / "absent.pem")):
        with pytest.raises(TlsUnusable, match=r": No such file or directory\. Name"):
            client_context(names)
    with pytest.raises(TlsUnusable, match=r": No such file or directory\. Name"):
        server_context(server.cert, tmp_path / "absent.pem")
