"""`agent schema`: JSON Schema of what the agent says, takes and writes: events, actions, file formats.

One document; every part of it is a schema of its own, and all share `$defs`:

    events    kind -> the event as it is shown in streams, in `agent ctl watch` and in the journal
    actions   name -> its scope, its payload and its answer
    messages  the frames of the control server: request, success, error
    files     suite.toml, agent.toml, rules.toml, result.json

Source: ARCHITECTURE.md, "The commands", "The way of the data"; protocols/emissary.md, "The envelope", "Control server".
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from agent.control.messages import ACTIONS, Gap, Nothing
from agent.core.events import KINDS
from agent.coverage.session import Status
from agent.files import messages as files
from agent.logs import messages as logs
from agent.settings import Settings
from agent.suites.messages import ResultDocument, Suite

DIALECT = "https://json-schema.org/draft/2020-12/schema"

# What actions take and answer whose folder checks them itself: control does not know it.
OF_FOLDERS: dict[str, tuple[Any, Any]] = {
    "watch_file": (files.WatchFile, files.Watched),
    "unwatch_file": (files.UnwatchFile, Nothing),
    "entitlement": (files.AskEntitlement, files.EntitlementNow),
    "watch_log": (logs.WatchLog, logs.Watching),
    "unwatch_log": (logs.UnwatchLog, Nothing),
    "search_log": (logs.SearchLog, logs.Searched),
    "label_log": (logs.LabelLog, logs.Labelled),
    "list_logs": (Nothing, logs.Logs),
    "coverage": (Nothing, Status),
}

ANY_ID = {"type": ["number", "string"]}
ANY_OBJECT = {"type": "object"}


def printed() -> str:
    """The document as text. The frozen form holds it ready made, for it has no docstrings to take descriptions from."""
    made = Path(__file__).with_name("schema.json")
    return made.read_text() if made.exists() else json.dumps(schema(), indent=2)


def schema() -> dict[str, Any]:
    """The whole document."""
    anything = dict[str, Any]
    known = {name: (action.takes or anything, action.answers or anything) for name, action in ACTIONS.items()}
    actions = known | OF_FOLDERS
    types: list[Any] = [*KINDS.values(), Gap, Suite, Settings, logs.RuleFile, ResultDocument]
    for pair in actions.values():
        types += pair
    schemas, defs = msgspec.json.schema_components(types, ref_template="#/$defs/{name}")
    _let_sizes_be_text(defs)
    found = dict(zip(map(_key, types), schemas, strict=True))
    events = {kind: _event(kind, found[_key(struct)]) for kind, struct in KINDS.items()}
    events["Gap"] = _object({"kind": {"const": "Gap"}, "data": found[_key(Gap)]})
    return {
        "$schema": DIALECT,
        "title": "Emissary: events, actions and files",
        "events": events,
        "actions": {
            name: {"scope": ACTIONS[name].scope, "payload": found[_key(takes)], "answer": found[_key(answers)]}
            for name, (takes, answers) in actions.items()
        },
        "messages": {
            "request": _object(
                {"action": {"type": "string"}, "req_id": ANY_ID, "posted": {"type": "boolean"}, "payload": ANY_OBJECT},
                required=(),
            ),
            "success": _object(
                {"action": {"type": "string"}, "rsp_id": ANY_ID, "result": {"const": "success"}, "payload": ANY_OBJECT}
            ),
            "error": _object(
                {
                    "result": {"const": "error"},
                    "rsp_id": {"type": ["number", "string", "null"]},
                    "reason": {"type": "string", "pattern": "^[a-z_]+: "},
                }
            ),
            "events": _object(
                {
                    "action": {"const": "events"},
                    "posted": {"const": True},
                    "payload": _object(
                        {
                            "sub": {"type": "integer"},
                            "events": {
                                "type": "array",
                                "items": {"anyOf": [{"$ref": f"#/events/{kind}"} for kind in events]},
                            },
                        }
                    ),
                }
            ),
        },
        "files": {
            "suite.toml": found[_key(Suite)],
            "agent.toml": found[_key(Settings)],
            "rules.toml": found[_key(logs.RuleFile)],
            "result.json": found[_key(ResultDocument)],
        },
        "$defs": defs,
    }


def _let_sizes_be_text(rule: Any) -> None:
    """A number with a pattern is a size, which a file may write "16MiB"; msgspec gives every int the one type."""
    if isinstance(rule, dict):
        if rule.get("type") == "integer" and "pattern" in rule:
            rule["type"] = ["integer", "string"]
        for inner in rule.values():
            _let_sizes_be_text(inner)
    elif isinstance(rule, list):
        for inner in rule:
            _let_sizes_be_text(inner)


def _event(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "string"}
    fields = {"seq": {"type": "integer"}, "at": {"type": "number"}, "kind": {"const": kind}, "run": text, "test": text}
    return _object(fields | {"data": data}, required=("seq", "at", "kind", "data"))


def _object(fields: dict[str, Any], required: tuple[str, ...] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields if required is None else required),
    }


def _key(kind: Any) -> str:
    return repr(kind)
