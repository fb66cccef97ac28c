"""The Drill agent against an admin on a line that breaks, over restarts: in the end the admin has what was seen.

What is undisturbed is the model: every probe that a collection brought while a session ran is the session's.
"""

import json
from collections import defaultdict, deque
from collections.abc import Iterable

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.coverage.catalog import Delta
from agent.coverage.messages import parts, read_asked
from agent.coverage.session import Saved
from agent.coverage.sessions import Act, Announce, Machine, Part, Ping, Say
from tests.drill_transcripts import EPOCH, action, content, message, unit

CLASSES, TESTS, SESSIONS = ("./a.js", "src/b.js"), ("", "t1", "t2"), ("s1", "s2", "s3")
NAMES = st.sampled_from(SESSIONS)


class Admin:
    """Reads what comes, in order; ORs the data of its sessions; knows what it was told and not."""

    def __init__(self) -> None:
        self.probes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.classes: set[str] = set()
        self.acks: list[str] = []
        self.cancelled: set[str] = set()
        self.finished: set[str] = set()
        self.started: set[str] = set()

    def read(self, frame: str) -> None:
        outer = json.loads(frame)
        if outer["type"] == "MESSAGE_DELIVERED":
            self.acks.append(outer["destination"])
            return
        tree = content(frame)
        match tree["type"]:
            case "INIT":
                self.classes.clear()
            case "INIT_DATA_PART":
                self.classes |= {f"{each['path']}/{each['name']}" for each in tree["astEntities"]}
            case "COVERAGE_DATA_PART":
                assert tree["sessionId"] not in self.cancelled
                for row in tree["data"]:
                    assert row["className"] in self.classes
                    bits = sum(flag << n for n, flag in enumerate(row["probes"]))
                    self.probes[tree["sessionId"]][row["className"]] |= bits
            case "SESSION_STARTED":
                self.started.add(tree["sessionId"])
            case "SESSION_FINISHED":
                self.finished.add(tree["sessionId"])
            case "SESSIONS_FINISHED":
                self.finished |= set(tree["ids"])
            case "SESSION_CANCELLED":
                self.cancelled.add(tree["sessionId"])
            case "SESSIONS_CANCELLED":
                self.cancelled |= set(tree["ids"])


class Drill(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now, self.alive = 0.0, False
        self.admin = Admin()
        self.machine = self.made()
        self.machine.announce(map(unit, CLASSES))
        self.line: deque[str | int] = deque()
        self.seen: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.stopped: set[str] = set()
        self.cancelled: set[str] = set()
        self.keys = 0
        self.attach()

    def made(self) -> Machine:
        return Machine(alive=lambda: self.alive, clock=lambda: EPOCH)

    def perform(self, acts: Iterable[Act]) -> None:
        """Put on the line what is sent, encoded; without a connection it is gone."""
        if not self.machine.connected:
            return
        for act in acts:
            match act:
                case Say(frame):
                    self.line.append(frame)
                case Announce(units):
                    entities = [{"path": each.path, "name": each.name} for each in units]
                    inner = json.dumps({"type": "INIT_DATA_PART", "astEntities": entities})
                    text = json.dumps({"pluginId": "test2code", "drillMessage": {"content": inner}})
                    self.line.append(json.dumps({"type": "PLUGIN_DATA", "text": text}))
                case Part(session, batches):
                    self.line.extend(parts(session, batches, self.machine.counts))
                case Ping(number):
                    self.line.append(number)

    def tell(self, frame: str) -> None:
        self.perform(self.machine.do(read_asked(frame), self.now))

    def order(self, kind: str, name: str | None = None) -> None:
        self.keys += 1
        self.tell(action(kind, None if name is None else {"sessionId": name, "testType": "AUTO"}, f"k{self.keys}"))

    def is_connected(self) -> bool:
        return self.machine.connected

    @precondition(is_connected)
    @rule(name=NAMES)
    def start(self, name: str) -> None:
        if name not in self.admin.cancelled | self.stopped:  # ids are used once
            self.order("START_AGENT_SESSION", name)

    @precondition(is_connected)
    @rule(name=NAMES)
    def stop(self, name: str) -> None:
        self.order("STOP", name)
        self.stopped.add(name)

    @precondition(is_connected)
    @rule()
    def stop_all(self) -> None:
        self.stopped |= set(self.machine.sessions)
        self.order("STOP_ALL")

    @precondition(is_connected)
    @rule(name=NAMES)
    def cancel(self, name: str) -> None:
        self.order("CANCEL", name)
        self.stopped.add(name)
        self.cancelled.add(name)  # what is on the line already may still be read

    @rule(
        class_id=st.sampled_from(CLASSES), test=st.sampled_from(TESTS), probes=st.integers(1, 255), later=st.booleans()
    )
    def collect(self, class_id: str, test: str, probes: int, later: bool) -> None:
        if later:
            self.now = max(self.now, min(self.machine.due(), self.now + 3))
        for session in self.machine.sessions.values():
            if session.state in ("running", "stopping"):
                self.seen[session.id][class_id] |= probes
        self.perform(self.machine.saw([Delta(class_id, probes, test)]))
        self.perform(self.machine.collected(self.now, self.now))

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def live_or_die(self) -> None:
        self.alive = not self.alive

    @precondition(is_connected)
    @rule()
    def toggle_again(self) -> None:
        self.tell(message("/plugin/togglePlugin", '{"pluginId":"test2code","forceValue":true}'))

    @rule(count=st.integers(1, 8))
    def read(self, count: int) -> None:
        for _ in range(min(count, len(self.line))):
            sent = self.line.popleft()
            if isinstance(sent, str):
                self.admin.read(sent)
            else:
                self.perform(self.machine.pong(sent))

    @precondition(is_connected)
    @rule()
    def cut(self) -> None:
        self.line.clear()
        self.machine.lost()

    @precondition(lambda self: not self.machine.connected)
    @rule()
    def attach(self) -> None:
        needs_sync = not self.machine.synced
        self.perform(self.machine.attached())
        if needs_sync:
            self.toggle_again()

    @rule()
    def restart(self) -> None:
        """An orderly one, or a kill after a checkpoint: what is starting was never answered, and is gone."""
        self.line.clear()
        kept = [each.saved() for each in self.machine.sessions.values() if each.state != "starting"]
        former, self.machine = self.machine, self.made()
        self.machine.announce(former.units.values())
        for saved in kept:
            self.machine.restore(msgspec.json.decode(msgspec.json.encode(saved), type=Saved), self.now)
        self.attach()

    @invariant()
    def the_admin_has_nothing_that_was_not_seen(self) -> None:
        for name, classes in self.admin.probes.items():
            for class_id, bits in classes.items():
                if name not in self.cancelled:
                    assert bits & ~self.seen[name][class_id] == 0

    def teardown(self) -> None:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        """The line holds, all is stopped and collected: every session that was answered has all, and its end."""
        if not self.machine.connected:
            self.attach()
        self.alive = False
        self.order("STOP_ALL")
        for _ in range(3):
            self.now += 3
            self.perform(self.machine.collected(self.now, self.now))
            self.read(len(self.line))
        assert not self.machine.sessions
        assert self.admin.acks[-2:] == [f"/plugin/action/k{self.keys}", "/plugin/action"]
        for name in self.seen.keys() - self.cancelled:
            classes = self.seen[name]
            assert name in self.admin.finished
            assert {class_id: bits for class_id, bits in classes.items() if bits} == self.admin.probes[name]


TestDrill = Drill.TestCase
