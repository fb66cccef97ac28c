"""The terms of all that the frozen agent holds of others, word for word, as one text: dist/LICENCES.txt.

A package of PyPI brings its terms along. Those of a shared library, or of what is linked in, are where the system it
was taken from keeps them: /usr/share/doc/NAME/copyright of Debian, /usr/share/licenses/NAME of Fedora.

Source: packaging sheet, section 3; issue "The binary".
"""

import re
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEPT = [Path("/usr/share/doc"), Path("/usr/share/licenses"), ROOT / ".deps/usr/share/doc"]  # .deps: packaging/deps
COMMON = re.compile(r"/usr/share/common-licenses/([A-Za-z0-9.-]*[A-Za-z0-9])")  # what Debian's texts refer to
# Where a part has no file that a package of the system owns: how the packages are called that hold its terms.
NAMED = {"PCRE2": "libpcre2-*", "Expat": "libexpat*", "mpdecimal": "libmpdec*"}


def of_distribution(found: metadata.Distribution) -> list[str]:
    """The terms that a package of PyPI brings."""
    names = re.compile(r"(licen[cs]e|copying|notice)", re.IGNORECASE)
    files = [file for file in found.files or [] if ".dist-info" in file.parts[0] and names.match(file.name)]
    return [Path(str(file.locate())).read_text(errors="replace") for file in sorted(files)]


def of_python() -> list[str]:
    file = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    return [file.read_text()] if file.exists() else []


def of_system(part: str, file: str | None) -> list[str]:
    """The terms of a library: of the package that its file is of, else of one that is called like it."""
    pattern = NAMED.get(part)
    if file is not None:
        pattern = package_of(file)
    if pattern is None:
        return []
    for folder in KEPT:
        for held in sorted(folder.glob(pattern)):
            files = [held / "copyright"] if folder.name == "doc" else sorted(held.iterdir())
            if texts := [path.read_text(errors="replace") for path in files if path.is_file()]:
                return texts
    return []


def package_of(file: str) -> str | None:
    """What the package of Debian or Fedora is called that a file is of."""
    for name in (file, file.removeprefix("/usr")):  # installed before /lib became a link to /usr/lib
        for ask in (["dpkg-query", "--search", name], ["rpm", "--query", "--qf", "%{NAME}:", "--file", name]):
            if said := _said(*ask):
                return said.partition(":")[0]
    return None


def version_of(package: str) -> str | None:
    """Its version, as those who wrote it count."""
    deb = _said("dpkg-query", "--show", "--showformat=${source:Upstream-Version}", package)
    return deb or _said("rpm", "--query", "--qf", "%{VERSION}", package)


def _said(*ask: str) -> str | None:
    """What a program says; None where it is not there, or fails."""
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def text(parts: Mapping[str, tuple[str, list[str]]]) -> str:
    """One text of the terms of all parts: their name with version, by (the name of the terms, their words).

    Parts whose words are the same share them. What the words refer to on a Debian system follows at the end.
    """
    return "\n".join(_lines(parts)) + "\n"


def _lines(parts: Mapping[str, tuple[str, list[str]]]) -> Iterator[str]:
    yield "Emissary holds the work of others. What, and by which terms:\n"
    for part, (terms, _) in parts.items():
        yield f"  {part}: {terms}"
    yield "\nThe terms of Emissary itself are for its owner to tell; no licence is granted here."
    told: dict[str, list[str]] = {}
    for part, (terms, words) in parts.items():
        missing = f"The machine that built this holds no text of these terms: {terms}, see https://spdx.org/licenses."
        told.setdefault("\n\n".join(word.strip() for word in words) or missing, []).append(part)
    for words, having in told.items():
        yield f"\n{'=' * 78}\n{', '.join(having)}\n{'=' * 78}\n\n{words}"
    common = {Path("/usr/share/common-licenses", name).resolve() for words in told for name in COMMON.findall(words)}
    for file in sorted(file for file in common if file.exists()):
        yield f"\n{'=' * 78}\n{file.name}\n{'=' * 78}\n\n{file.read_text(errors='replace').strip()}"
