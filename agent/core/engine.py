"""Which implementation of the native functions this machine runs (instruction set, chosen at run time)."""

from agent._native import ffi, lib


def _name(engine: int) -> str:
    return ffi.string(lib.engine_name(engine)).decode()


ENGINE = lib.engine_best()  # what to pass to a native function that takes an engine


def native_engine() -> str:
    """Name of the engine in use: avx2, sse2, neon or scalar."""
    return _name(ENGINE)


def available_engines() -> dict[str, int]:
    """Name to number of every engine that this build and this CPU have; scalar always. All give the same results."""
    return {_name(number): number for number in range(lib.ENGINE_COUNT) if lib.engine_available(number)}
