"""Which implementation of the native functions this machine runs (instruction set, chosen at run time).

AGENT_SIMD forces one by its name; a name that this machine does not have changes nothing, which is told.
Source: protocols/logs.md 2.4.
"""

import logging
import os

from agent._native import ffi, lib

log = logging.getLogger(__name__)


def _name(engine: int) -> str:
    return ffi.string(lib.engine_name(engine)).decode()


def available_engines() -> dict[str, int]:
    """Name to number of every engine that this build and this CPU have; scalar always. All give the same results."""
    return {_name(number): number for number in range(lib.ENGINE_COUNT) if lib.engine_available(number)}


# What to pass to a native function that takes an engine.
ENGINE = available_engines().get(os.environ.get("AGENT_SIMD", ""), lib.engine_best())
if os.environ.get("AGENT_SIMD") and os.environ["AGENT_SIMD"] != _name(ENGINE):
    log.warning(
        "AGENT_SIMD: %.40r is no engine of this machine, so %s is used. Set one of %s, or unset it.",
        os.environ["AGENT_SIMD"],
        _name(ENGINE),
        ", ".join(available_engines()),
    )

# `ffi.new` for what native functions fill before it is read: not cleared, so what is not used takes no memory.
room = ffi.new_allocator(should_clear_after_alloc=False)


def native_engine() -> str:
    """Name of the engine in use: avx512, avx2, ssse3, neon or scalar."""
    return _name(ENGINE)
