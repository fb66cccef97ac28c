"""`agent ctl`: one request to a running agent, or its events as JSON lines.

`watch` goes on when the connection is lost: it connects again and resumes behind the last event it printed.

Source: ARCHITECTURE.md, "The commands"; protocols/emissary.md, "Control server".
"""

import logging
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import trio

from agent.core.channel import Channel, Refused, converse
from agent.core.config import is_there
from agent.core.envelope import Request
from agent.core.errors import ActionError, PeerUnreachable
from agent.core.link import FIRST_RETRY_S, MAX_RETRY_S, Dial, connect
from agent.core.listen import split_address
from agent.core.metrics import Metrics
from agent.core.tls import TlsSettings
from agent.settings import Settings, find, state_dir

log = logging.getLogger(__name__)

ANSWER_S = 120.0  # s; a reload waits for roles to end


def dial_of(settings: Settings, url: str | None, token_file: Path | None) -> Dial:
    """How to reach the agent that runs with these settings, or the one at `url`, as a client.

    The agent here is known by its own certificate. Without `token_file` the first of control.tokens that is there is
    shown. Raises ValueError for what is no URL, and where none can be known.
    """
    folder, control = state_dir(settings), settings.control
    if url is None:
        scheme = "wss" if control.tls.cert else "ws"
        host, number = split_address(control.listen[0])
        if not number:
            raise ValueError(
                f"which port control.listen = {control.listen[0]!r} became was told in the agent's log alone"
                ' ("control listens addresses="): give --url'
            )
        url = f"{scheme}://{_reachable(host)}:{number}/"
        pinned = find(control.tls.cert, folder) if control.tls.cert else None  # made for the name that others use
    else:
        pinned = None
        scheme, colon, rest = url.partition("://")
        url = f"{ {'http': 'ws', 'https': 'wss'}.get(scheme, scheme) }{colon}{rest}"
    own = [find(token.file, folder) for token in control.tokens]
    files = [token_file] if token_file else [path for path in own if is_there(path)]
    tls, shown = settings.tls, (settings.tls.cert_file, settings.tls.key_file)
    if pinned and control.tls.client_ca and not tls.cert_file:
        shown = (control.tls.cert, control.tls.key)  # it asks for one of its authority, and this is at hand
    trusted, cert, key = (find(name, folder) if name else None for name in (tls.ca_file, *shown))
    return Dial(url=url, token_file=files[0] if files else None, tls=TlsSettings(trusted, cert, key, pinned))


def _reachable(host: str) -> str:
    """A host as it stands in a URL of this machine; where every address is meant, its loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def payload_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` arguments as a payload; a value is JSON, else text. Raises ValueError for what is no pair."""
    payload: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{pair!r} is no key=value")
        try:
            payload[key] = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            payload[key] = value
    return payload


async def ask(dial: Dial, action: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """One request and its answer's payload. Raises Refused, PeerRefused, PeerUnreachable."""
    answers: list[dict[str, Any]] = []

    async def talk(channel: Channel) -> None:
        answers.append(await channel.ask(action, payload, timeout_s=ANSWER_S))

    try:
        async with connect(dial) as ws:
            await converse(ws, _answer_nothing, talk, metrics=Metrics())
    except PeerUnreachable:
        if not answers:  # else it was lost as we left
            raise
    if not answers:
        raise PeerUnreachable(f"{dial.url} closed the connection without an answer", remedy="Look at the agent's log.")
    return answers[0]


def write_out(lines: str) -> None:
    """To standard output, at once: who reads it from a pipe waits for each line."""
    sys.stdout.write(lines)
    sys.stdout.flush()


async def watch(
    dial: Dial, kinds: Sequence[str], since: int | None, write: Callable[[str], None] = write_out
) -> NoReturn:
    """Write events as JSON lines, those after number `since` first, for ever.

    Raises what the first connection raises; later ones are tried again. Raises Refused when the agent has no journal
    any more that the events continue, and OSError when nothing more can be written.
    """
    watched = _Watch(kinds, since, write)
    retry_s = FIRST_RETRY_S
    while True:
        watched.is_open = False
        try:
            async with connect(dial) as ws:
                await converse(ws, watched.answer, watched.talk, metrics=Metrics())
        except PeerUnreachable as err:
            if not watched.was_open:
                raise
            log.info("connection lost error=%s", err)
        retry_s = FIRST_RETRY_S if watched.is_open else min(2 * retry_s, MAX_RETRY_S)
        await trio.sleep(retry_s * random.uniform(0.5, 1.0))


class _Watch:
    """What is printed, and from where to go on."""

    def __init__(self, kinds: Sequence[str], since: int | None, write: Callable[[str], None]) -> None:
        self.is_open = self.was_open = False
        self._kinds, self._since, self._write = kinds, since, write
        self._fault: OSError | None = None
        self._cannot_write = trio.Event()

    async def talk(self, channel: Channel) -> None:
        asked: dict[str, Any] = {"kinds": list(self._kinds)}
        if self._since is not None:
            asked["since"] = self._since
        try:
            answer = await channel.ask("subscribe", asked)
        except Refused as err:
            # While the agent starts or stops it may be unable; a refusal of what we asked stays one.
            if err.code in ("busy", "internal"):
                raise PeerUnreachable(err.what, remedy="Wait.") from err
            raise
        if self._since is None:
            self._since = answer["seq"]
        self.is_open = self.was_open = True
        await self._cannot_write.wait()
        if self._fault is not None:
            raise self._fault

    async def answer(self, request: Request) -> Mapping[str, Any]:
        if request.action != "events":
            raise ActionError("unknown_action", f"{request.action!r} is not events")
        events = request.payload.get("events", ())
        try:
            self._write("".join(msgspec.json.encode(event).decode() + "\n" for event in events))
        except OSError as err:  # its reader has gone, or a disk is full: that ends the command, not this request
            self._fault = err
            self._cannot_write.set()
            return {}
        for event in events:
            last = event["data"]["to"] if event["kind"] == "Gap" else event["seq"]
            self._since = max(self._since or 0, last)
        return {}


async def _answer_nothing(request: Request) -> Mapping[str, Any]:
    raise ActionError("unknown_action", "a client of one request answers none")
