"""Builds agent._native: every native/*.c and the declarations of native.h, by cffi in API mode (stable ABI).

setup.py names `ffibuilder`; setuptools compiles it. Paths are relative to the checkout, where setuptools runs, and no
debug information is kept: either would put the checkout's path into the bytes of a release.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
HEADER = HERE / "native.h"

ffibuilder = FFI()
# cffi reads declarations, not preprocessor lines.
ffibuilder.cdef("\n".join(line for line in HEADER.read_text().splitlines() if not line.startswith("#")))
ffibuilder.set_source(
    "agent._native",
    '#include "native.h"',
    sources=sorted(f"native/{path.name}" for path in HERE.glob("*.c")),
    depends=["native/native.h"],
    include_dirs=["native"],
    py_limited_api=True,
    extra_compile_args=[
        *("-std=c11", "-O2", "-g0", "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections"),
        *("-Wall", "-Wextra", "-Wno-unused-parameter"),
    ],
    extra_link_args=["-Wl,--exclude-libs,ALL,--gc-sections,--build-id=none"],
)
