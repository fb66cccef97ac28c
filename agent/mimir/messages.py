"""The payloads of the Mimir link, both ways, and what its labels and words may be.

Source: protocols/emissary.md, "Mimir".
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from agent.core.events import ReservationState

MAX_VERTICES = 256  # in one upsert
MAX_EDGES = 4 * MAX_VERTICES  # no vertex of ours comes with more
MAX_UPSERT = 64 * 1024  # bytes of the vertices and edges of one upsert
MAX_PAGE = 1000  # vertices in one answer to `query`
LEASE_S = 60.0  # a reservation that is not renewed for so long is lost
RENEW_S = 10.0  # every second heartbeat

VertexLabel: TypeAlias = Literal["TestPlatform", "Reservation", "Suite", "Run", "TestCase", "TestOutcome"]
EdgeLabel: TypeAlias = Literal["of", "under", "ran on", "in", "is in", "setup by", "implemented by"]
Result: TypeAlias = Literal["PASSED", "FAILED", "BLOCKED", "SKIPPED", "PENDING"]

# To which state a reservation may go. A refused run gives back what was only reserved.
TRANSITIONS: dict[ReservationState, frozenset[ReservationState]] = {
    "available": frozenset({"reserved", "returned", "lost"}),
    "reserved": frozenset({"running", "returned", "lost"}),
    "running": frozenset({"returned", "lost"}),
    "lost": frozenset({"running", "returned"}),
    "returned": frozenset(),
}
# The `rev` of each state, so that what comes late changes nothing. `lost` has none: a lost one may come back.
RESERVATION_REV: dict[ReservationState, int | None] = {
    "available": 0,
    "reserved": 1,
    "running": 2,
    "returned": 3,
    "lost": None,
}

Id: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # what every reader of JSON has exactly
Heard: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**48)]  # numbers go on above it: there has to be room
Props: TypeAlias = dict[str, Any]


class Register(msgspec.Struct, frozen=True, kw_only=True):
    """`register`, first on each connection. Who writes gives `instance`; a reader gives its `ident` only."""

    ident: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,128}$(?!\n)")]
    instance: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    version: str | None = None


class Registered(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to `register`. `last_seq` is the highest owed delivery it has; `time` its clock, epoch seconds."""

    session: str
    last_seq: Heard
    time: float


class Vertex(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A vertex to write. Props merge, a null deletes one. A `rev` lower than the stored one is ignored."""

    id: Id
    label: VertexLabel
    rev: Count | None = None
    props: Props = msgspec.field(default_factory=dict)


class Edge(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An edge to write; edges are a set."""

    src: Id = msgspec.field(name="from")
    label: EdgeLabel
    dst: Id = msgspec.field(name="to")
    props: Props = msgspec.field(default_factory=dict)


class Upsert(msgspec.Struct, frozen=True, kw_only=True):
    """`upsert`, one transaction. Without `seq` it is no owed delivery (renewals)."""

    seq: Count | None = None
    vertices: tuple[Vertex, ...] = ()
    edges: tuple[Edge, ...] = ()


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """`query`: a page of the vertices of a label, by id, from behind `after` on, with their edges of some labels."""

    label: VertexLabel
    where: dict[str, Any] = {}
    edges: tuple[EdgeLabel, ...] = ()
    after: str = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 100


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """`live`: the vertices that match, now or (with `since`) from that change on, and each further change."""

    label: VertexLabel
    where: dict[str, Any] = {}
    since: Count | None = None


class Unlive(msgspec.Struct, frozen=True, kw_only=True):
    """`unlive`: no more changes of that subscription."""

    sub: int


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """`change`, posted: a vertex came to match (create), changed, or matches no more (delete); its changed props."""

    sub: int
    seq: int
    op: Literal["create", "update", "delete"]
    label: VertexLabel
    id: str
    props: Props


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """`change` where changes are lost to the reader: those numbered from `from` to `to` are not kept any more."""

    sub: int
    seq: int
    op: Literal["Gap"] = "Gap"
    start: int = msgspec.field(name="from")
    end: int = msgspec.field(name="to")
