"""`agent schema` by PyPI `jsonschema`: it is a good schema, and what fits by our own test's reading fits by its."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent.core.events import Alert, Logged
from tests.control_house import client, house
from tests.json_schema import document

pytestmark = pytest.mark.interop

CHECKING = """
import json, sys
from jsonschema import Draft202012Validator as Validator
whole, events = json.load(sys.stdin)
for part in (*whole["events"].values(), *whole["messages"].values(), *whole["files"].values()):
    Validator.check_schema(part)
for action in whole["actions"].values():
    Validator.check_schema(action["payload"]), Validator.check_schema(action["answer"])
for rule in whole["$defs"].values():
    Validator.check_schema(rule)
message = {"$ref": "#/messages/events", **{name: whole[name] for name in ("events", "messages", "$defs")}}
good = {"action": "events", "posted": True, "payload": {"sub": 1, "events": events}}
bad = {"action": "events", "posted": True, "payload": {"sub": 1, "events": [{"seq": 1}]}}
print(json.dumps([[str(e) for e in Validator(message).iter_errors(good)], Validator(message).is_valid(bad)]))
"""


async def test_jsonschema_reads_it_as_we_do(python_peer: Callable[..., Path], tmp_path: Path) -> None:
    python = python_peer("jsonschema==4.26.0")
    async with house(tmp_path) as server, client(server.dial()) as them:
        await them.ask("subscribe", {"since": 0})
        server.publish(
            Logged(severity="INFO", message="x"), Alert(code="x", text="Full.", remedy="Make room.", since=1.0)
        )
        events = await them.told(3)
    asked = json.dumps([document(), events]).encode()
    done = await trio.run_process([str(python), "-c", CHECKING], stdin=asked, capture_stdout=True)
    assert json.loads(done.stdout) == [[], False]
