"""What a tier tells of what is below it: `children`, `get_tree`, `resolve`.

Source: protocols/gator.md, "Dialects", "Decisions" (`children`, `get_tree`); seeds/gator-websocket-api.md, "Children",
"Get Tree".
"""

import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import trio

from agent.core.channel import Channel
from agent.core.errors import PeerError
from agent.gator import messages
from agent.gator.dialects import wrong
from agent.gator.elsewhere import ASK_S, Elsewhere
from agent.gator.layer import Below, States
from agent.gator.layerdb import read_job
from agent.gator.messages import ApiJob, Number
from agent.gator.tree import Kid, Tree

log = logging.getLogger(__name__)


class View:
    """Used by one tier. `here` are the children in this process; `own` is the tier itself, with these children."""

    def __init__(
        self,
        tree: Tree,
        here: Mapping[str, Below],
        elsewhere: Elsewhere | None,
        folder: Path,
        path: list[str],
        uids: Mapping[str, int],
        own: Callable[[list[ApiJob]], ApiJob],
    ) -> None:
        self._tree, self._here, self._elsewhere = tree, here, elsewhere
        self._folder, self._path, self._uids, self._own = folder, path, uids, own

    def children(self, asked: messages.Children) -> dict[str, Any]:
        """As the seed tells them. Raises ActionError."""
        return {
            ident: msgspec.to_builtins(kid.tell(self._metrics(ident, kid))) for ident, kid in self._asked_for(asked)
        }

    def jobs(self, asked: messages.Children) -> list[dict[str, Any]]:
        """As D2 tells them. Raises ActionError."""
        return [msgspec.to_builtins(self._job(ident, kid)) for ident, kid in self._asked_for(asked)]

    def _asked_for(self, asked: messages.Children) -> Iterator[tuple[str, Kid]]:
        kids = iter(self._tree.kids.items())
        if asked.after is not None and all(ident != asked.after for ident, _ in kids):
            raise wrong(f"children: there is no child {asked.after!r} to begin behind")
        return islice(kids, asked.limit)

    async def states(self) -> States:
        """Every child with its state; a tier that runs, with all below it."""
        found: States = {ident: kid.state for ident, kid in self._tree.kids.items()}
        for ident, layer in list(self._here.items()):
            found[ident] = await layer.states()
        if self._elsewhere is not None:
            async with trio.open_nursery() as nursery:
                for ident, channel in self._elsewhere.links():
                    if self._tree.kids[ident].state == "STARTED" and self._tree.size_of(ident).tiers:
                        nursery.start_soon(self._ask_states, ident, channel, found)
        return found

    async def _ask_states(self, ident: str, channel: Channel, found: States) -> None:
        try:
            below = await channel.ask("get_tree", {}, timeout_s=ASK_S)
        except PeerError as err:
            log.info("tree not told ident=%s error=%s", ident, err)
            return  # its own state stands
        found[ident] = below[ident] if below.keys() == {ident} else below

    async def resolve(self, request: messages.Resolve) -> ApiJob:
        """The tier, or what is below it by `root_path`; `nest_path` nests one child chain, `depth` levels of all.

        Raises ActionError.
        """
        if request.root_path:
            name, *rest = request.root_path
            return await self._below(name, msgspec.structs.replace(request, root_path=rest))
        if request.nest_path:
            name, *rest = request.nest_path
            return self._own([await self._below(name, msgspec.structs.replace(request, nest_path=rest))])
        deeper = messages.Resolve(depth=max(request.depth - 1, 0))
        return self._own([await self._below(ident, deeper) for ident in self._tree.kids] if request.depth else [])

    async def _below(self, ident: str, request: messages.Resolve) -> ApiJob:
        kid = self._tree.kids.get(ident)
        if kid is None:
            raise wrong(f"resolve: there is no child {ident!r}")
        if (layer := self._here.get(ident)) is not None and kid.state != "COMPLETE":
            return await layer.resolve(request)
        link = self._elsewhere.link(ident) if self._elsewhere else None
        if kid.state == "STARTED" and link is not None and link.channel is not None and link.dialect == "emissary":
            try:
                payload = msgspec.to_builtins(request)
                payload.pop("path")
                return msgspec.convert(await link.channel.ask("resolve", payload, timeout_s=ASK_S), ApiJob)
            except (PeerError, msgspec.ValidationError) as err:
                log.info("not resolved ident=%s error=%s", ident, err)
        wants_more = request.root_path or request.nest_path or request.depth
        if kid.state != "COMPLETE" or not (wants_more and self._tree.size_of(ident).tiers):
            if request.root_path:
                raise wrong(f"resolve: {ident!r} has no child {request.root_path[0]!r}")
            return self._job(ident, kid)
        file = self._folder.joinpath(kid.child.folder, "db.sqlite")
        try:
            return await trio.to_thread.run_sync(_from_files, file, request)
        except (OSError, sqlite3.Error, ValueError) as err:
            raise wrong(f"resolve: {ident!r}: {err}") from err

    def _metrics(self, ident: str, kid: Kid) -> dict[str, Number]:
        return {} if kid.result == "ABORTED" else dict(self._tree.total.get(ident).metrics)

    def _job(self, ident: str, kid: Kid) -> ApiJob:
        status, result = kid.numbers
        size = self._tree.size_of(ident)
        return ApiJob(
            uidx=self._uids[ident],
            root=0,
            path=self._path,
            ident=ident,
            status=status,
            metrics=self._metrics(ident, kid),
            server_url=kid.server,
            db_file=str(self._folder.joinpath(kid.child.folder, "db.sqlite")),
            started=kid.at_start,
            updated=kid.at_update,
            stopped=kid.at_end,
            result=result,
            owner=None,
            children=[],
            expected_children=size.jobs if size.tiers else 0,
        )


def _from_files(file: Path, request: messages.Resolve) -> ApiJob:
    """A tier that has ended, or what was below it. Blocks."""
    way, chain = list(request.root_path), list(request.nest_path)
    job = read_job(file, depth=1)
    while way:
        name = way.pop(0)
        found = next((Path(child.db_file) for child in job.children if child.ident == name), None)
        if found is None:
            raise ValueError(f"there is no child {name!r}")
        file, job = found, read_job(found, depth=1)
    if not chain:
        return read_job(file, request.depth)
    below = _from_files(file, messages.Resolve(root_path=chain[:1], nest_path=chain[1:], depth=request.depth))
    return msgspec.structs.replace(job, children=[below])
