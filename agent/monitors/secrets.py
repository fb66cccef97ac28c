"""Secrets of a monitor's configuration: put in at each run, and taken out of everything that it says.

    "@secret@:web-token"        the file of that name in the secrets directory, less one final line end
    "@secret@:web#api.key"      a field of such a file that holds JSON
    "@env@:Bearer ${TOKEN}"     with variables of the agent's environment

    AgentError
    └── SecretUnresolved        a reference cannot be resolved; names the key, never a value

Source: protocols/monitors.md, "Limits and security".
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from agent.core.errors import AgentError

SHORTEST = 4  # a shorter value would stand in half of all texts
MASK = "***"

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


class SecretUnresolved(AgentError):
    """A reference in the configuration leads nowhere: the run is not started."""

    def __init__(self, key: str, what: str, *, remedy: str) -> None:
        super().__init__(f"{key}: {what}", remedy=remedy)
        self.key = key


def resolve(tree: Any, read: Callable[[str], str], env: Mapping[str, str], key: str = "config") -> tuple[Any, set[str]]:
    """The tree with its references resolved, and every value that was put in. Raises SecretUnresolved.

    `read` gives the text of a secret by its name, or raises OSError or ValueError.
    """
    match tree:
        case dict():
            parts = {name: resolve(value, read, env, f"{key}.{name}") for name, value in tree.items()}
            return {name: value for name, (value, _) in parts.items()}, {
                v for _, found in parts.values() for v in found
            }
        case list() | tuple():
            rows = [resolve(value, read, env, f"{key}[{i}]") for i, value in enumerate(tree)]
            return [value for value, _ in rows], {v for _, found in rows for v in found}
        case str() if tree.startswith("@secret@:"):
            value = _secret(tree.removeprefix("@secret@:"), read, key)
            return value, {value}
        case str() if tree.startswith("@env@:"):
            text = tree.removeprefix("@env@:")
            names = _VARIABLE.findall(text)
            for name in names:
                if name not in env:
                    raise SecretUnresolved(
                        key, f"the agent's environment has no {name}", remedy="Set it where the agent is started."
                    )
            return _VARIABLE.sub(lambda found: env[found[1]], text), {env[name] for name in names}
        case _:
            return tree, set()


def _secret(reference: str, read: Callable[[str], str], key: str) -> str:
    name, has_field, field = reference.partition("#")
    if not _NAME.fullmatch(name):
        raise SecretUnresolved(key, f"{name!r} is not a file's name", remedy="Name a file of monitors.secrets_dir.")
    try:
        text = read(name)
    except (OSError, ValueError) as err:
        why = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
        raise SecretUnresolved(
            key, f"the secret {name!r} cannot be read: {why}", remedy="Put it into monitors.secrets_dir, mode 0600."
        ) from err
    if not has_field:
        return text
    value: Any = None
    try:
        value = json.loads(text)
        for step in field.split("."):
            value = value[step]
    except (ValueError, KeyError, TypeError, RecursionError):
        value = None
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise SecretUnresolved(key, f"the secret {name!r} has no field {field!r}", remedy="Correct the field's name.")
    return str(value)


class Redactor:
    """Takes secrets out of texts, as they are and as JSON writes them, also line by line and without white space at
    their ends: lines of noise lose it.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        lines = {line for value in values for line in (value, *value.splitlines())}
        parts = lines | {line.strip() for line in lines}
        shapes = {shape for part in parts for shape in (part, json.dumps(part)[1:-1], _json_unicode(part))}
        self._shapes = sorted((shape for shape in shapes if len(shape) >= SHORTEST), key=len, reverse=True)
        self._found = re.compile("|".join(map(re.escape, self._shapes))) if self._shapes else None
        self.longest = max((len(shape.encode()) for shape in self._shapes), default=0)

    def clean(self, text: str, *, cut: bool = False) -> str:
        """The text with *** for each secret. `cut`: it goes on behind its end, so half a secret may stand there."""
        if self._found is None:
            return text
        text = self._found.sub(MASK, text)
        if cut:
            for length in range(min(len(text), max(map(len, self._shapes)) - 1), 0, -1):
                if any(shape.startswith(text[-length:]) for shape in self._shapes):
                    return text[:-length] + MASK
        return text

    def clean_end(self, text: str, *, cut: bool) -> str:
        """The same for the end of a text; `cut`: its beginning is missing."""
        text = self.clean(text)
        if cut and self._found is not None:
            for length in range(min(len(text), max(map(len, self._shapes)) - 1), 0, -1):
                if any(shape.endswith(text[:length]) for shape in self._shapes):
                    return MASK + text[length:]
        return text


def _json_unicode(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
