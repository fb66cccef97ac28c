"""Private keys are told by their names and by what is in them, in all their clothes."""

import base64

import pytest

from agent.files.private_keys import is_private_key

PEM = "-----BEGIN {}PRIVATE KEY-----\nMIIE\n"
CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nMIID\n-----END CERTIFICATE-----\n"
PKCS7 = bytes.fromhex("3082032806092a864886f70d010702a0820319")  # certificates, as of openssl crl2pkcs7
PGP_PUBLIC = bytes.fromhex("99010d046b03ad3601")


@pytest.mark.parametrize(
    "name",
    [
        "key.pem", "123456-key.pem", "server.key", "server.KEY", "id_ed25519", "host.p12", "store.jks", "putty.ppk",
        "my_private.pem", "host_key", "key", "shadow", "krb5.keytab", "signing.p8",
    ],
)  # fmt: skip
def test_by_name(name: str) -> None:
    assert is_private_key(name, b"")


@pytest.mark.parametrize("name", ["cert.pem", "69.pem", "rhsm.conf", "id_ed25519.pub", "keyboard.conf", "monkey.txt"])
def test_other_names_are_none(name: str) -> None:
    assert not is_private_key(name, CERTIFICATE)


@pytest.mark.parametrize(
    "data",
    [
        *(PEM.format(kind).encode() for kind in ("", "RSA ", "EC ", "ENCRYPTED ", "OPENSSH ")),
        b"-----BEGIN PGP PRIVATE KEY BLOCK-----",
        CERTIFICATE + PEM.format("RSA ").encode(),
        PEM.format("").encode("utf-16"),
        b"PuTTY-User-Key-File-3: ssh-ed25519",
        b"AGE-SECRET-KEY-1QQPQ",
        b'{"kty":"EC","crv":"P-256","d":"x"}',
        b'{"type":"service_account","private_key": "x"}',
        b"\xfe\xed\xfe\xed\0\0\0\2",
        base64.b64decode("MIIEpAIBAAKCAQEA"),  # PKCS#1
        base64.b64decode("MIIEvgIBADANBgkqhkiG9w0BAQEFAASC"),  # PKCS#8
        base64.b64decode("MHcCAQEEIA=="),  # SEC 1
        bytes.fromhex("308204e33051060 92a864886f70d01050d3044".replace(" ", "")),  # PKCS#8, encrypted
        bytes.fromhex("308204ea301c060a2a864886f70d010c0103300e0408"),  # by PBE-SHA1-3DES
        bytes.fromhex("308204e9301b06092a864886f70d010503300e0408"),  # by PBE-MD5-DES
        bytes.fromhex("1ef1b5b00000000001000000"),  # Microsoft's PVK
        bytes.fromhex("0702000000a4000052534132"),  # PRIVATEKEYBLOB
        bytes.fromhex("950398046b03ad3601"),  # OpenPGP, as gpg --export-secret-keys writes it
        bytes.fromhex("c54b0665b1c2d31b"),  # and version 6
        b"[Interface]\nPrivateKey = yAnz5TF+lXXJ\n",  # WireGuard
    ],
)
def test_by_content(data: bytes) -> None:
    assert is_private_key("69.pem", data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        CERTIFICATE,
        base64.b64decode("MIIDdzCCAl+gAwIBAgIEAgAAuTAN"),
        b"[server]\nhostname = x\n",
        b"\x30\x82",
        PKCS7,
        PGP_PUBLIC,
    ],
)
def test_other_content_is_none(data: bytes) -> None:
    assert not is_private_key("69.pem", data)
