"""Whether the system's clock is synchronised, as the kernel knows it.

Source: protocols/settings.md, `clock.wait_sync_s`; adjtimex(2).
"""

import ctypes
import logging
import os

import trio

log = logging.getLogger(__name__)

_TIME_ERROR = 5  # sys/timex.h: the clock is not synchronised
_TIMEX_SIZE = 256  # bytes; struct timex has 208 on 64-bit systems, and all zero means: only tell
_LOOK_S = 1.0


def is_synchronised() -> bool:
    """True also where the kernel does not say."""
    # ctypes: one call at start is not worth a declaration in the native module.
    state: int = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_TIMEX_SIZE))
    if state < 0:
        log.warning("clock state unknown error=%s", os.strerror(ctypes.get_errno()))
    return state != _TIME_ERROR


async def wait_synchronised(within_s: float) -> bool:
    """Wait until the clock is synchronised, at most so long; whether it is."""
    with trio.move_on_after(within_s):
        while not is_synchronised():  # noqa: ASYNC110 - the kernel has no event for it
            await trio.sleep(_LOOK_S)
    return is_synchronised()
