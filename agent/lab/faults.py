"""What a lab server can do wrong, on purpose: switches for tests and for who tries an agent out.

Source: protocols/emissary.md, "Real peers for tests" (`agent lab` plays them, with switches for every fault above).
"""

from typing import Annotated

import msgspec
import trio

from agent.core.errors import ActionError


class Faults(msgspec.Struct, kw_only=True):
    """Switches that may be turned while the server runs.

    `silent`: requests are neither carried out nor answered. `late_s`: each answer comes so many seconds late. `cut`:
    so many times the connection is cut when an answer is due, with the request carried out. `duplicate`: each `run` is
    sent twice. `refuse`: a request whose text holds this is answered by an error.
    """

    silent: bool = False
    late_s: Annotated[float, msgspec.Meta(ge=0)] = 0
    cut: Annotated[int, msgspec.Meta(ge=0)] = 0
    duplicate: bool = False
    refuse: str = ""

    async def before(self, text: str) -> None:
        """A request came. Raises ActionError when it is to be refused; never returns while silent."""
        if self.silent:
            await trio.sleep_forever()
        if self.refuse and self.refuse in text:
            raise ActionError("bad_payload", f"told to refuse what holds {self.refuse!r}")

    async def after(self) -> bool:
        """An answer is due. True: cut the connection instead."""
        await trio.sleep(self.late_s)
        if self.cut:
            self.cut -= 1
            return True
        return False
