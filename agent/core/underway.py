"""The runs that are under way: what a role that follows runs asks for when it begins after them, restarted alone.

Source: protocols/settings.md, "Names that several folders share"; protocols/suites.md, "A run".
"""

from agent.core.bus import Bus
from agent.core.errors import ActionError
from agent.core.events import RunReceived, decode
from agent.core.store import Store


async def underway(bus: Bus, store: Store) -> list[RunReceived]:
    """The orders of the runs that were taken and are not over; none while the suites role is not up."""
    try:
        runs = (await bus.ask("runs", {}))["runs"]
    except ActionError:
        return []
    orders = [await order_of(run["run"], store) for run in runs]
    return [order for order in orders if order is not None]


async def order_of(run: str, store: Store) -> RunReceived | None:
    """How a run was ordered, from the journal; None for one that the journal does not know."""
    await store.commit()
    rows = await store.read(run=run, kinds=("RunReceived",), limit=1)
    received = decode(rows[0].kind, rows[0].data) if rows else None
    return received if isinstance(received, RunReceived) else None
