"""Certificates for tests of TLS, made by the `openssl` command."""

import subprocess
from pathlib import Path

import msgspec


class Issued(msgspec.Struct, frozen=True):
    """Where a certificate and its key are."""

    cert: Path
    key: Path


def authority(folder: Path, name: str = "ca") -> Issued:
    """A new authority that signs itself."""
    issued = Issued(folder / f"{name}.pem", folder / f"{name}.key")
    _openssl(issued, "-subj", f"/CN=test {name}", "-addext", "basicConstraints=critical,CA:TRUE")
    return issued


def issue(by: Issued, folder: Path, name: str, san: str = "IP:127.0.0.1") -> Issued:
    """A certificate for `name` with that subject alternative name, signed by an authority."""
    issued = Issued(folder / f"{name}.pem", folder / f"{name}.key")
    _openssl(issued, "-subj", f"/CN={name}", "-addext", f"subjectAltName={san}", "-CA", by.cert, "-CAkey", by.key)
    return issued


def expire(by: Issued, folder: Path, name: str) -> Issued:
    """A certificate for `name`, signed by an authority, that was good in 2020."""
    issued = Issued(folder / f"{name}.pem", folder / f"{name}.key")
    request, config = folder / f"{name}.csr", folder / "ca.conf"
    (folder / "ca.index").touch()
    config.write_text(
        f"[ca]\ndefault_ca=it\n[it]\ndatabase={folder}/ca.index\nnew_certs_dir={folder}\nrand_serial=yes\n"
        "default_md=sha256\npolicy=names\n[names]\ncommonName=supplied\n"
    )
    new = ("openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")
    sign = ("openssl", "ca", "-batch", "-notext", "-config", config, "-cert", by.cert, "-keyfile", by.key)
    within = ("-startdate", "20200101000000Z", "-enddate", "20200201000000Z")
    for argv in (
        (*new, "-keyout", issued.key, "-out", request, "-subj", f"/CN={name}"),
        (*sign, *within, "-in", request, "-out", issued.cert),
    ):
        subprocess.run(argv, check=True, capture_output=True)
    return issued


def _openssl(issued: Issued, *more: str | Path) -> None:
    new = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "2")
    subprocess.run([*new, "-out", issued.cert, "-keyout", issued.key, *more], check=True, capture_output=True)
