"""Transcripts of a monitor's run: what it says (M>), what it is told (O>), and what follows from it (=>)."""

from typing import Any

from agent.monitors.messages import Noise, parse
from agent.monitors.secrets import Redactor
from agent.monitors.session import Act, Leave, Poll, Say, Session, StepEnded, Told
from agent.monitors.settings import Monitor

EPOCH = 1_795_294_381.0


def monitor(**changes: Any) -> Monitor:
    """A monitor with one step and short names for its times."""
    plain: dict[str, Any] = {"id": "web", "command": ("web",), "steps": ("Ping",), "timeout": 10.0}
    graces = {"handshake_timeout": 60.0, "exit_grace": 30.0, "eof_grace": 2.0}
    return Monitor(**(plain | graces | changes))


def session(config: str = "{}", *, redactor: Redactor | None = None, spoken: Any = None, **changes: Any) -> Session:
    return Session(
        monitor(**changes), config, 0.0, epoch=EPOCH, redactor=redactor or Redactor(), spoken=spoken
    )  # fmt: skip


def play(run: Session, transcript: str) -> None:
    """`M> a | b`: one read with two messages; `N>` noise; `E>` stderr; `T> 12.5`: the clock; `X> 3` or `X> SIGSEGV`."""
    due: list[str] = []
    now = 0.0
    for line in filter(None, map(str.strip, transcript.splitlines())):
        mark, text = line[:2], line[3:]
        if mark in ("O>", "=>"):
            assert line == (due.pop(0) if due else None)
            continue
        assert not due, f"not expected before {line!r}: {due}"
        match mark:
            case "M>":
                said = [parse(each.encode()) for each in text.split(" | ")]
                assert all(said), line
                acts = run.feed([each for each in said if each], now)
            case "N>":
                acts = run.feed([Noise(text)], now)
            case "E>":
                run.keep_stderr(f"{text}\n".encode())
                acts = run.errors([Noise(text)], now)
            case "T>":
                now = float(text)
                acts = run.tick(now)
            case "S>":
                acts = run.stop(now)
            case "X>":
                acts = run.exited(None, text, now) if text.startswith("SIG") else run.exited(int(text), None, now)
            case _:
                raise AssertionError(line)
        due = [_written(act) for act in acts]
    assert not due, f"not in the transcript: {due}"


def _written(act: Act) -> str:
    match act:
        case Say(text):
            return f"O> {text}"
        case Leave(word, grace_s):
            return f"=> leave {word} {grace_s:g}"
        case Poll(uid):
            return f"=> poll {uid}"
        case Told(source, level, text, step):
            return f"=> {source} {level} {step or '-'}: {text}"
        case StepEnded():
            shown = [act.step, act.state]
            if act.ms is not None:
                shown.append(f"{act.ms:g} ms by {act.timed_by}")
            if act.cause:
                shown.append(f"({act.cause})")
            if act.metadata:
                shown.append(",".join(f"{key}={value}" for key, value in act.metadata.items()))
            shown += [f"{name}={value}" for name in ("rc", "signal") if (value := getattr(act, name)) is not None]
            return " ".join(["=>", *shown]) + (f": {act.text}" if act.text is not None else "")
