"""Transcripts of a Drill agent: what happens to it in one column, what it does about it below.

A> /agent/load {"meta":{"id":"test2code"}}      a message of the admin to that topic
A> STOP {"sessionId":"s1"} k1                   an action of the admin, with or without its key
C> ./a.js 101 t1.test.js, ./b.js 1              a collection that found that: class, flags of its probes, test
+  2.0                                          that much time goes by
attach | cut | pong 3 | alive | dead            the link, an answered ping, whether a covered process lives
=> ...                                          an act; `ts` is left out
"""

import json
from typing import Any

import msgspec

from agent.core.covered import CoverageLost, CoverageSession, CoverageWarning
from agent.coverage.catalog import Delta, Method, Unit
from agent.coverage.messages import read_asked
from agent.coverage.sessions import Act, Announce, Empty, Machine, Map, Part, Ping, Say

EPOCH = 1_795_294_679.0


def unit(class_id: str, count: int = 8, checksum: str = "c0") -> Unit:
    path, _, name = class_id.rpartition("/")
    method = Method(name="GLOBAL", params=(), return_type="", probes=tuple(range(count)), checksum=checksum)
    return Unit(path=path, name=name, methods=(method,), lines=tuple(range(1, count + 1)), file=f"/product/{class_id}")


def bits(flags: str) -> int:
    """ "101" is probes 0 and 2."""
    return int(flags[::-1] or "0", 2)


def flags(probes: int) -> str:
    return f"{probes:b}"[::-1]


def message(topic: str, text: str = "") -> str:
    return json.dumps({"type": "MESSAGE", "destination": topic, "text": text})


def action(kind: str, payload: Any = None, key: str | None = None) -> str:
    """A frame with an action, nested as the admin nests it."""
    tree = {"type": kind} | ({} if payload is None else {"payload": payload})
    text = {"id": "test2code", "message": json.dumps(tree)} | ({} if key is None else {"confirmationKey": key})
    return message("/plugin/action", json.dumps(text))


def content(frame: str) -> Any:
    """What a frame of ours says, by an independent reader; its `ts` must be bare milliseconds, and is left out."""
    outer = json.loads(frame)
    assert outer.keys() == {"type", "text"}
    inner = json.loads(outer["text"])
    assert (outer["type"], inner["pluginId"], inner["drillMessage"].keys()) == ("PLUGIN_DATA", "test2code", {"content"})
    tree = json.loads(inner["drillMessage"]["content"])
    if "ts" in tree:
        assert tree.pop("ts") == int(EPOCH * 1000)
    return tree


def told(act: Act, first: int = 0) -> str:
    """An act as it stands in a transcript; pings are counted after `first`."""
    match act:
        case Say(frame) if json.loads(frame)["type"] == "MESSAGE_DELIVERED":
            return f"ack {json.loads(frame)['destination']}"
        case Say(frame):
            tree = content(frame)
            return f"{tree.pop('type')} {json.dumps(tree, separators=(',', ':'))}"
        case Announce(units):
            return f"classes {' '.join(each.class_id for each in units)}"
        case Part(session, batches):
            entries = (entry for batch in batches for entry in batch.entries())
            return f"part {session} " + ", ".join(f"{name} {flags(probes)} {test}" for name, test, probes in entries)
        case Ping(number):
            return f"ping {number - first}"
        case Map(session, data):
            return f"map {session} {data}"
        case Empty(session):
            return f"empty {session}"
        case CoverageSession():
            return f"{act.state} {act.session}"
        case CoverageLost():
            return f"lost {act.session} {act.classes} {act.why}"
        case CoverageWarning():
            return f"warning {act.session} {act.text}"


class Played:
    """A machine with its time; `play` goes on where the last one ended."""

    def __init__(self, *classes: str, **options: Any) -> None:
        self.now, self.is_alive = 100.0, False
        self.maps: list[Map] = []
        self.first = 0
        self.machine = Machine(alive=lambda: self.is_alive, clock=lambda: EPOCH, **options)
        self.machine.announce(unit(name) for name in classes)

    @property
    def link(self) -> str:
        return self.machine.link

    def play(self, transcript: str) -> None:
        due: list[str] = []
        for line in filter(None, map(str.strip, transcript.splitlines())):
            if line.startswith("=> "):
                assert line[3:] == (due.pop(0) if due else None)
                continue
            assert not due, f"not expected before {line!r}: {due}"
            acts = self.does(line)
            self.maps += [act for act in acts if isinstance(act, Map)]
            due = [told(act, self.first) for act in acts]
        assert not due, f"not in the transcript: {due}"

    def does(self, line: str) -> list[Act]:
        machine = self.machine
        match line.split():
            case ["A>", topic, *text] if topic.startswith("/"):
                return machine.do(read_asked(message(topic, " ".join(text))), self.now)
            case ["A>", kind]:
                return machine.do(read_asked(action(kind)), self.now)
            case ["A>", kind, payload, *key]:
                return machine.do(read_asked(action(kind, json.loads(payload), *key)), self.now)
            case ["C>", *_]:
                found = [each.split() for each in line[3:].split(",") if each.strip()]
                deltas = [Delta(name, bits(probes), *test) for name, probes, *test in found]
                return [*machine.saw(deltas), *machine.collected(self.now, self.now)]
            case ["+", seconds]:
                self.now += float(seconds)
                return []
            case ["attach"]:
                return machine.attached()
            case ["cut"]:
                machine.lost()
                return []
            case ["pong", number]:
                return machine.pong(int(number) + self.first)
            case ["alive" | "dead" as word]:
                self.is_alive = word == "alive"
                return []
            case _:
                raise AssertionError(f"no such line: {line!r}")

    def restarted(self, **options: Any) -> "Played":
        """The same agent in a new process, from its checkpoint as the store keeps it."""
        other = Played(**options)
        other.machine.announce(self.machine.units.values())
        for session in self.machine.sessions.values():
            kept = msgspec.json.encode(session.saved())
            other.machine.restore(msgspec.json.decode(kept, type=type(session.saved())), other.now)
        return other


def enabled(*classes: str, **options: Any) -> Played:
    """An agent whose plugin the admin has enabled."""
    played = Played(*classes, **options)
    for line in ("attach", 'A> /agent/load {"meta":{"id":"test2code"},"data":[]}'):
        played.does(line)
    for act in played.does('A> /plugin/togglePlugin {"pluginId":"test2code","forceValue":true}'):
        if isinstance(act, Ping):
            played.machine.pong(act.number)
            played.first = act.number
    return played
