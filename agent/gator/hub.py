"""Gator's hub: a root tells it that it is there, how it stands, and its end. Best effort: no answer changes anything.

Source: protocols/gator.md, "Command line" (`--hub`).
"""

import getpass
import logging
from collections.abc import Callable
from typing import Any, Final, Protocol

import httpx
import msgspec
import trio

from agent.core.payload import UNREADABLE
from agent.gator.dialects import written_d2
from agent.gator.messages import RESULTS, Result
from agent.gator.summary import Summary

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 5.0


class Root(Protocol):
    """The layer that is told of."""

    ident: str

    @property
    def result(self) -> Result: ...

    def summary(self) -> Summary: ...


async def tell(
    hub: str, newest: Callable[[], Root], url: str, layer: str, db_file: str, interval_s: float, ended: trio.Event
) -> None:
    """Register the root, whose port is at `url`, at `hub` (HOST:PORT); tell of it each interval, and of its end.

    `newest` gives its newest attempt.

    Returns when `ended` is set and that is told.
    """
    async with httpx.AsyncClient(base_url=f"http://{hub}", timeout=TIMEOUT_S) as client:
        about = {"ident": newest().ident, "url": url, "layer": layer, "owner": _user()}
        answer = await _post(client, "/api/register", about)
        uid = answer.get("uid")
        if not isinstance(uid, int | str):
            return
        while not ended.is_set():
            with trio.move_on_after(interval_s):
                await ended.wait()
            await _post(client, f"/api/job/{uid}/heartbeat", written_d2(newest().summary()))
        end = {"db_file": db_file, "result": RESULTS.index(newest().result)}
        await _post(client, f"/api/job/{uid}/complete", end)


async def _post(client: httpx.AsyncClient, path: str, payload: dict[str, Any]) -> dict[str, Any]:
    """The answer's object; {} where there is none."""
    try:
        answer = await client.post(path, content=msgspec.json.encode(payload), headers=_JSON)
        answer.raise_for_status()
        told = msgspec.json.decode(answer.content or b"{}")
    except (httpx.HTTPError, httpx.InvalidURL, *UNREADABLE) as err:
        log.warning("hub does not take path=%s error=%s", path, str(err) or type(err).__name__)
        return {}
    return told if isinstance(told, dict) else {}


_JSON: Final = {"Content-Type": "application/json"}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name
        return ""
