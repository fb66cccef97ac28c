"""What both kinds of layer answer on their ports.

Source: protocols/gator.md, "Dialects" (`resolve`, `get_messages`), "The wire".
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from agent.core.envelope import Request
from agent.gator import messages
from agent.gator import spec as specs
from agent.gator.dialects import named, read
from agent.gator.journal import Journal
from agent.gator.messages import ApiJob, Dialect
from agent.gator.tree import Tree


def asker_dialect(request: Request) -> Dialect | None:
    """What a request tells of who asks, beside those of children; None when it tells nothing."""
    if request.action != "resolve":
        return None
    if "path" in request.payload:
        return "d1"
    return "d2" if request.payload.keys() & {"root_path", "nest_path", "depth"} else None


def told_spec(tree: Tree, payload: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to `spec`: in the words of D0 for a child named so, with our keys for ours. Raises ActionError.

    Source: seeds/gator-websocket-api.md, "Spec".
    """
    ident, as_d0 = named("spec", payload)
    ours = isinstance(payload.get("emissary"), dict)
    return {"spec": specs.dump(tree.spec_of(ident), named="id" if as_d0 else "ident", ours=ours)}


async def told_messages(
    journal: Journal, payload: Mapping[str, Any], status: int, dialect: Dialect | None
) -> dict[str, Any]:
    """The answer to `get_messages`: D0 and D1 tell by `after` the first uid that they want, D2 the last that it has.

    `dialect` is the asker's, as far as it is known; a `format` in the payload ("d1", "d2") overrules it.
    """
    request: messages.GetMessages = read("get_messages", payload, messages.GetMessages)
    inclusive = payload.get("format", dialect) in ("d0", "d1")
    rows = await journal.read(request.after + (not inclusive), request.limit)
    return {
        "messages": [
            {"uid": row.uid, "severity": row.severity, "message": row.message, "timestamp": int(row.timestamp)}
            for row in rows
        ],
        "total": journal.logs,
        "status": status,
    }


async def told_layer(
    resolve: Callable[[messages.Resolve], Awaitable[ApiJob]], payload: Mapping[str, Any]
) -> dict[str, Any]:
    """The answer to `resolve`: D1 asks by `path` and is told less."""
    request: messages.Resolve = read("resolve", payload, messages.Resolve)
    if request.path is None:
        told: dict[str, Any] = msgspec.to_builtins(await resolve(request))
        return told
    job = await resolve(messages.Resolve(root_path=request.path, depth=1))
    return {
        "ident": job.ident,
        "server_url": job.server_url,
        "metrics": job.metrics,
        "children": [child.ident for child in job.children],
    }
