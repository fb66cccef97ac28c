"""Builds agent._native: every native/*.c and the declarations of native.h, by cffi in API mode (stable ABI).

setup.py names `ffibuilder`; setuptools compiles it. Paths are relative to the checkout, where setuptools runs, and no
debug information is kept: either would put the checkout's path into the bytes of a release.

PCRE2 is linked from its static archive: the compiler's own, or the one that packaging/deps fetched into .deps/. A
distribution that has none gives its shared library.
"""

import subprocess
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
HEADER = HERE / "native.h"
FETCHED = Path(".deps/usr")


def pcre2() -> tuple[list[str], list[str]]:
    """Folders with pcre2.h beside the compiler's own, and what the linker is told."""
    if archives := sorted((HERE.parent / FETCHED).glob("lib/*/libpcre2-8.a")):
        return [f"{FETCHED}/include"], [str(archives[0].relative_to(HERE.parent))]
    asked = subprocess.run(["cc", "-print-file-name=libpcre2-8.a"], capture_output=True, text=True, check=True)
    archive = asked.stdout.strip()  # the bare name where there is none
    return [], [archive if "/" in archive else "-lpcre2-8"]


includes, linked = pcre2()
ffibuilder = FFI()
# cffi reads declarations, not preprocessor lines.
ffibuilder.cdef("\n".join(line for line in HEADER.read_text().splitlines() if not line.startswith("#")))
ffibuilder.set_source(
    "agent._native",
    '#include "native.h"',
    sources=sorted(f"native/{path.name}" for path in HERE.glob("*.c")),
    depends=["native/native.h", "native/words.h"],
    include_dirs=["native", *includes],
    py_limited_api=True,
    extra_compile_args=[
        *("-std=c11", "-O2", "-g0", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections"),
        *("-Wall", "-Wextra", "-Wno-unused-parameter"),
        "-fno-math-errno",  # a square root is an instruction, and no library's
    ],
    extra_link_args=["-Wl,--exclude-libs,ALL,--gc-sections,--build-id=none", *linked],
)
