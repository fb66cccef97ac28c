"""`agent schema`: it is about every event, action and file, and fits what the agent really says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.control.messages import ACTIONS
from agent.core import toml
from agent.core.envelope import Envelope, error, success
from agent.core.events import KINDS, Recorded, scope
from agent.logs.rules import BUNDLED
from agent.settings import Settings
from agent.suites import result
from agent.suites.prepare import tree_of
from tests.ended_run import finished
from tests.json_schema import check_event, document, faults

SAMPLES = Path(__file__).parents[1] / "agent/lab/samples"


def values(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Any value of a type, as an event's field may hold it."""
    match kind:
        case msgspec.inspect.StrType():
            return st.text(max_size=8)
        case msgspec.inspect.BytesType():
            return st.binary(max_size=8)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.IntType():
            return st.integers(0, 2**53)
        case msgspec.inspect.FloatType():
            return st.floats(0, 2e9)
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.AnyType():
            return st.none() | st.integers(0, 9) | st.text(max_size=3)
        case msgspec.inspect.LiteralType(values=words):
            return st.sampled_from(words)
        case msgspec.inspect.UnionType(types=types):
            return st.one_of(*map(values, types))
        case msgspec.inspect.VarTupleType(item_type=item):
            return st.lists(values(item), max_size=2).map(tuple)
        case msgspec.inspect.ListType(item_type=item):
            return st.lists(values(item), max_size=2)
        case msgspec.inspect.TupleType(item_types=items):
            return st.tuples(*map(values, items))
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values(key), values(value), max_size=2)
        case msgspec.inspect.Metadata(type=inner):
            return values(inner)
        case msgspec.inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: values(field.type) for field in fields})
        case _:
            raise AssertionError(f"no values for {kind}")


def test_it_is_about_every_event_action_and_file() -> None:
    whole = document()
    assert whole["events"].keys() == KINDS.keys() | {"Gap"}
    assert whole["actions"].keys() == ACTIONS.keys()
    assert whole["files"].keys() == {"suite.toml", "agent.toml", "rules.toml", "result.json"}


@pytest.mark.parametrize("kind", sorted(KINDS))
@given(data=st.data())
def test_every_event_fits_as_it_is_shown(kind: str, data: st.DataObject) -> None:
    event = data.draw(values(msgspec.inspect.type_info(KINDS[kind])))
    run, test = scope(event)
    encoded = msgspec.Raw(msgspec.json.encode(event))
    shown = Recorded(seq=1, at=2.5, kind=kind, run=run, test=test, data=encoded)
    check_event(json.loads(msgspec.json.encode(shown)))


def test_what_does_not_fit_is_said() -> None:
    alert = {"seq": 1, "at": 2.5, "kind": "Alert", "data": {"code": "x", "text": 7, "remedy": ""}}
    assert faults(alert, "events", "Alert") == ["$.data.text: 7 is no string", "$.data.since is missing"]
    assert faults({"kind": "Gap", "data": {"from": 1}}, "events", "Gap") == ["$.data.to is missing"]
    assert faults({"policy": "wait"}, "actions", "subscribe", "payload")


def test_the_frames_of_the_envelope_fit() -> None:
    envelope = Envelope()
    assert not faults(json.loads(envelope.ask("status", {})[1]), "messages", "request")
    assert not faults(json.loads(envelope.post("events", {"sub": 1, "events": []})), "messages", "events")
    assert not faults(json.loads(success("status", "x", {})), "messages", "success")
    assert not faults(json.loads(error(None, "bad_json: no object")), "messages", "error")


@pytest.mark.parametrize("sample", ["ava", "pytest", "command"])
def test_the_suites_of_the_demo_fit(sample: str) -> None:
    assert not faults(json.loads(json.dumps(tree_of(SAMPLES / sample))), "files", "suite.toml")


def test_settings_fit_with_their_defaults_and_with_sizes_as_written() -> None:
    defaults = msgspec.to_builtins(Settings())
    assert not faults(json.loads(json.dumps(defaults)), "files", "agent.toml")
    assert not faults({"state": {"reserve": "16MiB"}, "control": {"listen": ["[::1]:5"]}}, "files", "agent.toml")
    assert faults({"state": {"reserve": "16 elephants"}}, "files", "agent.toml")
    assert faults({"control": {"lisen": []}}, "files", "agent.toml") == ["$.control.lisen is too much"]


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.toml")), ids=lambda path: path.stem)
def test_every_rule_file_of_the_bundle_fits(path: Path) -> None:
    document = toml.read(path).data
    assert not faults(document, "files", "rules.toml")
    assert faults({**document, "version": 2}, "files", "rules.toml")
    assert faults({"version": 1, "rule": [{"id": "x", "regex": "y", "regexp": "z"}]}, "files", "rules.toml")


def test_a_result_document_fits() -> None:
    text = b"".join(result.document(finished("r-9"), []))
    assert not faults(json.loads(text), "files", "result.json")


def test_the_command_prints_it() -> None:
    argv = [sys.executable, "-m", "agent", "schema"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == document()
