"""What `make dist` does with what was frozen: the list of its parts, their licences, deb and rpm, checksums of all.

Run in the environment that PyInstaller ran in: what is said of a part is what its own files say. Times are
SOURCE_DATE_EPOCH, so that the same tree gives the same bytes.

Source: packaging sheet, sections 2 and 3; CycloneDX 1.6.
"""

import decimal
import hashlib
import json
import os
import platform
import re
import sqlite3
import ssl
import subprocess
import sys
import tomllib
import uuid
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.parsers import expat

import licences  # beside this file
from PyInstaller.archive.readers import CArchiveReader

from agent.logs import regex

ROOT = Path(__file__).parent.parent
DIST, ONEDIR = ROOT / "dist", ROOT / "dist/onedir"
EPOCH = int(os.environ["SOURCE_DATE_EPOCH"])
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm7"}  # as nfpm calls them

LICENCES = "LICENCES.txt"
BOOTLOADER = "GPL-2.0-or-later WITH Bootloader-exception"
# A shared library by how its name begins: whose it is, under which licence, and what tells its version; None: the
# system's package that its file is of.
LIBRARIES: dict[str, tuple[str, str, Callable[[], str] | None]] = {
    "libpython": ("CPython", "Python-2.0.1", platform.python_version),
    "libcrypto": ("OpenSSL", "Apache-2.0", lambda: ssl.OPENSSL_VERSION.split()[1]),
    "libssl": ("OpenSSL", "Apache-2.0", lambda: ssl.OPENSSL_VERSION.split()[1]),
    "libsqlite3": ("SQLite", "blessing", lambda: sqlite3.sqlite_version),
    "libz": ("zlib", "Zlib", lambda: zlib.ZLIB_RUNTIME_VERSION),
    "libexpat": ("Expat", "MIT", lambda: expat.EXPAT_VERSION.removeprefix("expat_")),
    "libmpdec": ("mpdecimal", "BSD-2-Clause", lambda: decimal.__libmpdec_version__),
    "libpcre2": ("PCRE2", "BSD-3-Clause", lambda: regex.version().split()[0]),
    "libffi": ("libffi", "MIT", None),
    "liblzma": ("XZ Utils", "0BSD", None),
    "libuuid": ("libuuid", "BSD-3-Clause", None),
}
LINKED_IN = ("libexpat", "libmpdec", "libpcre2")  # where they are no files of their own


def packaged_version(file: str) -> str:
    """The upstream version of what the system installed the file from; without a package, what its name ends in."""
    package = licences.package_of(file)
    return (package and licences.version_of(package)) or file.partition(".so.")[2]


def distributions() -> list[metadata.Distribution]:
    """The packages of PyPI that something inside is from. Raises SystemExit for a module that is nobody's."""
    modules = CArchiveReader(str(ONEDIR / "agent")).open_embedded_archive("PYZ.pyz").toc
    inside = {name.split(".")[0] for name in modules} | {
        path.name.split(".")[0] for path in (ONEDIR / "lib").rglob("*.so") if path.parent == ONEDIR / "lib"
    }
    owners = metadata.packages_distributions()
    foreign = inside - sys.stdlib_module_names - {"agent"}
    if strangers := foreign - owners.keys():
        sys.exit(f"inside, and of no package: {', '.join(sorted(strangers))}. Exclude it in packaging/agent.spec.")
    names = {owner for name in foreign for owner in owners[name]}
    return sorted(map(metadata.distribution, names), key=lambda found: found.name.lower())


def licence(package: metadata.PackageMetadata) -> list[dict[str, Any]]:
    """A package's licence as CycloneDX has it: an expression of SPDX, else the words its author chose."""
    if "License-Expression" in package:
        return [{"expression": package["License-Expression"]}]
    classifiers = [name.rpartition(" :: ")[2] for name in package.get_all("Classifier", ()) if "License ::" in name]
    words = package["License"].partition("\n")[0] if "License" in package else "not stated"
    return [{"license": {"name": name}} for name in classifiers or [words]]


def named(terms: list[dict[str, Any]]) -> str:
    """The same in words."""
    each = [term.get("expression") or term["license"].get("id") or term["license"]["name"] for term in terms]
    return ", ".join(each)


def packages() -> Iterator[dict[str, Any]]:
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    locked = {package["name"]: package for package in lock["package"]}
    for found in distributions():
        name = re.sub(r"[-_.]+", "-", found.name).lower()
        if locked[name]["version"] != found.version:
            sys.exit(f"{name} {found.version} is inside, {locked[name]['version']} in uv.lock. Run make dist again.")
        url = f"pkg:pypi/{name}@{found.version}"
        yield {
            "type": "library",
            "bom-ref": url,
            "name": name,
            "version": found.version,
            "licenses": licence(found.metadata),
            "purl": url,
        }


def libraries() -> Iterator[dict[str, Any]]:
    sources: dict[str, str] = json.loads((ROOT / "build/agent/libraries.json").read_text())
    files = {path.name for path in (ONEDIR / "lib").glob("lib*.so*")}
    parts = {}
    for file in sorted(files) + [name for name in LINKED_IN if not any(f.startswith(name) for f in files)]:
        kind = file.partition(".so")[0].partition("-")[0].rstrip("0123456789.")
        kind = next((known for known in LIBRARIES if known.rstrip("0123456789") == kind), kind)
        if kind not in LIBRARIES:
            sys.exit(f"{file} is inside, and not in the table of packaging/release.py. Add it there.")
        name, terms, version = LIBRARIES[kind]
        told = version() if version else packaged_version(sources[file])
        parts[name] = {
            "type": "library",
            "bom-ref": f"{name}@{told}",
            "name": name,
            "version": told,
            "licenses": [{"license": {"id": terms}}],
        }
    yield from parts.values()
    frozen_by = metadata.version("pyinstaller")
    yield {
        "type": "library",
        "bom-ref": f"pkg:pypi/pyinstaller@{frozen_by}",
        "name": "pyinstaller-bootloader",
        "version": frozen_by,
        "licenses": [{"expression": BOOTLOADER}],
        "purl": f"pkg:pypi/pyinstaller@{frozen_by}",
    }


def terms() -> str:
    """The words of the licences of all parts."""
    sources: dict[str, str] = json.loads((ROOT / "build/agent/libraries.json").read_text())
    files = {LIBRARIES[kind][0]: file for name, file in sources.items() for kind in LIBRARIES if name.startswith(kind)}
    words = {found.name.lower(): licences.of_distribution(found) for found in distributions()}
    words |= {"CPython": licences.of_python()}
    words |= {"pyinstaller-bootloader": licences.of_distribution(metadata.distribution("pyinstaller"))}
    found = {}
    for part in [*packages(), *libraries()]:
        name = part["name"]
        held = words.get(name) or licences.of_system(name, files.get(name))
        if not held:
            print(f"licences: this machine holds no text of {name}'s; only its name is told")
        found[f"{name} {part['version']}"] = (named(part["licenses"]), held)
    return licences.text(found)


def bill_of_materials(version: str) -> dict[str, Any]:
    """What is inside, as CycloneDX."""
    parts = [*packages(), *libraries()]
    subject = {"type": "application", "bom-ref": f"emissary@{version}", "name": "emissary", "version": version}
    digest = {"alg": "SHA-256", "content": hashlib.sha256((DIST / "agent").read_bytes()).hexdigest()}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, json.dumps([subject, digest, parts])).urn,
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(EPOCH, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {**subject, "hashes": [digest]},
        },
        "components": parts,
        "dependencies": [{"ref": subject["bom-ref"], "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def main() -> None:
    said = subprocess.run([ONEDIR / "agent", "--version", "--json"], capture_output=True, check=True).stdout
    facts = json.loads(said)
    machine = platform.machine()
    bom = DIST / "agent.cdx.json"
    bom.write_text(json.dumps(bill_of_materials(facts["version"]), indent=1) + "\n")
    (DIST / LICENCES).write_text(terms())
    for path in [bom, DIST / LICENCES, DIST / "agent", ONEDIR, *ONEDIR.rglob("*")]:
        os.utime(path, (EPOCH, EPOCH))
    filled = {"VERSION": facts["version"], "ARCH": ARCHITECTURES[machine], "GLIBC": facts["glibc"]}
    results = [DIST / "agent", bom, DIST / LICENCES]
    for kind in ("deb", "rpm"):
        package = DIST / f"emissary_{facts['version']}_{machine}.{kind}"
        nfpm = [str(Path(sys.executable).with_name("nfpm")), "package", "--config", "packaging/nfpm.yaml"]
        what = ["--packager", kind, "--target", str(package)]
        subprocess.run([*nfpm, *what], cwd=ROOT, env=os.environ | filled, check=True, stdout=subprocess.DEVNULL)
        results.append(package)
    for old in set(DIST.glob("emissary_*")) - set(results):  # of another version
        old.unlink()
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in results]
    (DIST / "SHA256SUMS").write_text("".join(lines))
    for path in results:
        print(f"{path.stat().st_size / 1e6:6.1f} MB  {path.relative_to(ROOT)}")
    print(f"needs glibc {facts['glibc']} or newer")


if __name__ == "__main__":
    main()
