"""Which implementation of the native functions this machine runs (instruction set, chosen at run time).

AGENT_SIMD forces one by its name; a name that this machine does not have changes nothing.
Source: protocols/logs.md 2.4.
"""

import os

from agent._native import ffi, lib


def _name(engine: int) -> str:
    return ffi.string(lib.engine_name(engine)).decode()


def available_engines() -> dict[str, int]:
    """Name to number of every engine that this build and this CPU have; scalar always. All give the same results."""
    return {_name(number): number for number in range(lib.ENGINE_COUNT) if lib.engine_available(number)}


# What to pass to a native function that takes an engine.
ENGINE = available_engines().get(os.environ.get("AGENT_SIMD", ""), lib.engine_best())

# `ffi.new` for what native functions fill before it is read: not cleared, so what is not used takes no memory.
room = ffi.new_allocator(should_clear_after_alloc=False)


def native_engine() -> str:
    """Name of the engine in use: avx512, avx2, ssse3, neon or scalar."""
    return _name(ENGINE)
