"""The graph that the lab's Mimir keeps: vertices and edges in SQLite, and the last changes for live queries.

All calls block; agent/lab/mimir.py makes them in a worker thread, one at a time.

Source: protocols/emissary.md, "Mimir".
"""

import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from agent.core.errors import ActionError
from agent.core.events import RunState, State
from agent.lab.transaction import transaction
from agent.lab.where import Where, matches
from agent.mimir.messages import (
    MAX_EDGES,
    MAX_UPSERT,
    MAX_VERTICES,
    TRANSITIONS,
    Edge,
    Query,
    Result,
    Upsert,
    Vertex,
    VertexLabel,
)

KEEP_CHANGES = 100_000  # for `live` with `since`
MAX_ANSWER = 512 * 1024  # bytes of vertices in one answer; the next page has the rest

_TABLES = """
CREATE TABLE IF NOT EXISTS vertex(id TEXT PRIMARY KEY, label TEXT NOT NULL, rev INTEGER, props TEXT NOT NULL,
    seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS vertex_label ON vertex(label, id);
CREATE INDEX IF NOT EXISTS vertex_lease ON vertex(json_extract(props, '$.lease_until')) WHERE label = 'Reservation';
CREATE TABLE IF NOT EXISTS edge(src TEXT, label TEXT, dst TEXT, props TEXT NOT NULL, seq INTEGER NOT NULL,
    PRIMARY KEY(src, label, dst)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS edge_dst ON edge(dst, label);
CREATE TABLE IF NOT EXISTS change(seq INTEGER PRIMARY KEY, id TEXT NOT NULL, label TEXT NOT NULL, before TEXT,
    after TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS writer(ident TEXT, instance TEXT, last_seq INTEGER NOT NULL,
    PRIMARY KEY(ident, instance)) WITHOUT ROWID;
"""

# Which words some props may be, and which form some ids have.
_WORDS: dict[tuple[VertexLabel, str], frozenset[str]] = {
    ("TestOutcome", "result"): frozenset(get_args(Result)),
    ("TestOutcome", "state"): frozenset(get_args(State)),
    ("Reservation", "state"): frozenset(TRANSITIONS),
    ("Run", "state"): frozenset(get_args(RunState)),
}
_IDS: dict[VertexLabel, re.Pattern[str]] = {
    "TestPlatform": re.compile(r"[A-Za-z0-9._-]{1,128}"),
    "Reservation": re.compile(r"[A-Za-z0-9._-]{1,128}/\d+/\d+"),
    "Suite": re.compile(r"[A-Za-z0-9._-]{1,128}"),
    "Run": re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}"),
    "TestCase": re.compile(r"[A-Za-z0-9._-]{1,128}:.+", re.DOTALL),
    "TestOutcome": re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}:.+", re.DOTALL),
}

_dumps = msgspec.json.Encoder(order="sorted").encode
_loads = msgspec.json.Decoder(dict[str, Any]).decode


class Changed(msgspec.Struct, frozen=True):
    """A change of a vertex: its props before (None: it was made) and after."""

    seq: int
    id: str
    label: VertexLabel
    before: dict[str, Any] | None
    after: dict[str, Any]

    def seen(self, where: Where) -> tuple[str, dict[str, Any]] | None:
        """What it is to a reader of what matches: the op and the changed props (null: deleted); None: nothing."""
        was, matched = self.before or {}, self.before is not None and matches(where, self.before)
        matching = matches(where, self.after)
        if not (matched or matching):
            return None
        if not matched:
            return "create", self.after
        props = {
            key: self.after.get(key) for key in was.keys() | self.after.keys() if was.get(key) != self.after.get(key)
        }
        return "update" if matching else "delete", props


class Graph:
    """One graph file."""

    def __init__(self, path: Path, *, keep_changes: int = KEEP_CHANGES) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._keep_changes = keep_changes
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # what is answered is on disk
        self._db.executescript(_TABLES)
        self.seq = int(self._db.execute("SELECT coalesce(max(seq), 0) FROM change").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def last_seq(self, ident: str, instance: str) -> int:
        """The highest delivery of a writer; 0 for one that is not known."""
        sql = "SELECT last_seq FROM writer WHERE ident = ? AND instance = ?"
        row = self._db.execute(sql, (ident, instance)).fetchone()
        return int(row[0]) if row else 0

    def upsert(self, upsert: Upsert, writer: tuple[str, str] | None = None) -> int:
        """Write in one transaction; how many vertices and edges changed.

        A delivery of `writer` (ident, instance) that is not above its last one changes nothing. Raises ActionError
        `bad_payload` or `too_big`; then nothing of it is written.
        """
        _check(upsert)
        seq = self.seq
        try:
            with transaction(self._db):
                if writer is not None and upsert.seq is not None:
                    if upsert.seq <= self.last_seq(*writer):
                        return 0
                    self._db.execute("INSERT OR REPLACE INTO writer VALUES(?, ?, ?)", (*writer, upsert.seq))
                changed = sum(self._put(vertex, f"vertices[{i}]") for i, vertex in enumerate(upsert.vertices))
                changed += sum(map(self._link, upsert.edges))
                self._db.execute("DELETE FROM change WHERE seq <= ?", (self.seq - self._keep_changes,))
                return changed
        except BaseException:
            self.seq = seq
            raise

    def query(self, query: Query, where: Where) -> dict[str, Any]:
        """The answer to `query`."""
        found: list[dict[str, Any]] = []
        size, following = 0, None
        sql = "SELECT id, rev, props FROM vertex WHERE label = ? AND id > ? ORDER BY id"
        for key, rev, props in self._db.execute(sql, (query.label, query.after)):
            if not matches(where, tree := _loads(props)):
                continue
            if found and (len(found) == query.limit or size + len(props) > MAX_ANSWER):
                following = found[-1]["id"]
                break
            size += len(props)
            found.append({"id": key, "label": query.label, "rev": rev, "props": tree})
        edges = self._edges([vertex["id"] for vertex in found], query.edges)
        return {"vertices": found, "edges": edges, "next": following}

    def snapshot(self, label: VertexLabel, where: Where) -> list[dict[str, Any]]:
        """All that matches. Raises ActionError `too_big` where that is too much for one answer."""
        page = self.query(Query(label=label, limit=1000), where)
        if page["next"] is not None:
            what = f"more {label} match than fit one answer; narrow `where`, or `query` page by page and give `since`"
            raise ActionError("too_big", what)
        vertices: list[dict[str, Any]] = page["vertices"]
        return vertices

    def changes(self, label: VertexLabel, since: int, limit: int = 500) -> list[Changed]:
        """The changes of a label above number `since`, in order."""
        sql = "SELECT seq, id, label, before, after FROM change WHERE seq > ? AND label = ? ORDER BY seq LIMIT ?"
        return [
            Changed(seq, key, label, None if before is None else _loads(before), _loads(after))
            for seq, key, label, before, after in self._db.execute(sql, (since, label, limit))
        ]

    def oldest_change(self) -> int:
        """The lowest number that is kept; one above the highest when none is."""
        return int(self._db.execute("SELECT coalesce(min(seq), ?) FROM change", (self.seq + 1,)).fetchone()[0])

    def lapse(self, now: float) -> list[str]:
        """Write `lost` for the reservations whose lease has passed and that are not lost or returned: these."""
        sql = (
            "SELECT id FROM vertex INDEXED BY vertex_lease WHERE label = 'Reservation'"
            " AND json_extract(props, '$.lease_until') <= ?"
            " AND json_extract(props, '$.state') IN ('available', 'reserved', 'running')"
        )
        lapsed = [key for (key,) in self._db.execute(sql, (now,))]
        for key in lapsed:
            self.upsert(
                Upsert(vertices=(Vertex(id=key, label="Reservation", props={"state": "lost", "lost_at": now}),))
            )
        return lapsed

    def outcomes(self, run: str) -> dict[str, int]:
        """How many TestOutcomes of a run have which result."""
        sql = (
            "SELECT json_extract(vertex.props, '$.result'), count(*) FROM edge JOIN vertex ON id = src"
            " WHERE dst = ? AND edge.label = 'in' GROUP BY 1"
        )
        return dict(self._db.execute(sql, (run,)))

    def rows(self) -> list[tuple[Any, ...]]:
        """Every vertex and edge as it is stored, to compare."""
        vertices = self._db.execute("SELECT * FROM vertex ORDER BY id").fetchall()
        return vertices + self._db.execute("SELECT * FROM edge ORDER BY src, label, dst").fetchall()

    def _put(self, vertex: Vertex, where: str) -> int:
        row = self._db.execute("SELECT label, rev, props FROM vertex WHERE id = ?", (vertex.id,)).fetchone()
        if row is None:
            before, rev = None, vertex.rev
            after = {key: value for key, value in vertex.props.items() if value is not None}
        else:
            label, rev, before = row[0], row[1], _loads(row[2])
            if label != vertex.label:
                raise ActionError("bad_payload", f"key {where}.label: {vertex.id} is a {label}, not a {vertex.label}")
            if vertex.rev is not None and rev is not None and vertex.rev < rev:
                return 0
            after = {key: value for key, value in {**before, **vertex.props}.items() if value is not None}
            _check_transition(vertex, before, after, where)
            rev = rev if vertex.rev is None else vertex.rev
            if after == before and rev == row[1]:
                return 0
        self.seq += 1
        text = _dumps(after).decode()
        put = "INSERT OR REPLACE INTO vertex VALUES(?, ?, ?, ?, ?)"
        self._db.execute(put, (vertex.id, vertex.label, rev, text, self.seq))
        log = "INSERT INTO change VALUES(?, ?, ?, ?, ?)"
        earlier = None if before is None else _dumps(before).decode()
        self._db.execute(log, (self.seq, vertex.id, vertex.label, earlier, text))
        return 1

    def _link(self, edge: Edge) -> int:
        key = (edge.src, edge.label, edge.dst)
        row = self._db.execute("SELECT props FROM edge WHERE src = ? AND label = ? AND dst = ?", key).fetchone()
        before = None if row is None else _loads(row[0])
        after = {name: value for name, value in {**(before or {}), **edge.props}.items() if value is not None}
        if after == before:
            return 0
        text = _dumps(after).decode()
        self._db.execute("INSERT OR REPLACE INTO edge VALUES(?, ?, ?, ?, ?)", (*key, text, self.seq))
        return 1

    def _edges(self, ids: Sequence[str], labels: Sequence[str]) -> list[dict[str, Any]]:
        if not ids or not labels:
            return []
        some, named = ",".join("?" * len(ids)), ",".join("?" * len(labels))
        sql = (
            f"SELECT src, label, dst, props FROM edge WHERE label IN ({named}) AND (src IN ({some}) OR dst IN ({some}))"
        )
        rows = self._db.execute(f"{sql} ORDER BY src, label, dst", (*labels, *ids, *ids))
        return [{"from": src, "label": label, "to": dst, "props": _loads(props)} for src, label, dst, props in rows]


def _check(upsert: Upsert) -> None:
    if len(upsert.vertices) > MAX_VERTICES or len(upsert.edges) > MAX_EDGES:
        what = f"{len(upsert.vertices)} vertices, {len(upsert.edges)} edges; at most {MAX_VERTICES}, {MAX_EDGES} fit"
        raise ActionError("too_big", what)
    size = sum(len(_dumps(part)) for part in (*upsert.vertices, *upsert.edges))
    if size > MAX_UPSERT:
        raise ActionError("too_big", f"vertices and edges of {size} bytes; at most {MAX_UPSERT} fit")
    for i, vertex in enumerate(upsert.vertices):
        if not _IDS[vertex.label].fullmatch(vertex.id):
            raise ActionError("bad_payload", f"key vertices[{i}].id: {vertex.id!r} is no id of a {vertex.label}")
        for name, value in vertex.props.items():
            words = _WORDS.get((vertex.label, name))
            if words is not None and value is not None and not (isinstance(value, str) and value in words):
                known = " ".join(sorted(words))
                raise ActionError("bad_payload", f"key vertices[{i}].props.{name}: {value!r} is none of {known}")


def _check_transition(vertex: Vertex, before: dict[str, Any], after: dict[str, Any], where: str) -> None:
    old, new = before.get("state"), after.get("state")
    if vertex.label == "Reservation" and old is not None and new != old and new not in TRANSITIONS[old]:
        raise ActionError("bad_payload", f"key {where}.props.state: {vertex.id} cannot go from {old} to {new}")
