"""One run of one monitor as a state machine: what it says goes in, what is to be done comes out.

    starting -Started-> greeted -Ready-> configuring -Configured-> step -result-> step ... -> ending -exit-> over

Every planned step gets exactly one StepEnded, whatever happens. Times that come in are seconds of a clock that never
steps; `epoch` is what the wall clock said at its zero, and times that go out are epoch seconds.

Source: protocols/monitors.md, "State machine of a run", "Dialects", "Results"; seeds/orchestrator-monitor-protocol.md.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import msgspec

from agent.monitors import messages
from agent.monitors.framing import MAX_LINE
from agent.monitors.messages import (
    Configured,
    Dialect,
    Exit,
    Level,
    Log,
    Message,
    Noise,
    Ready,
    Result,
    Started,
    StepError,
    StepOk,
    StepTime,
    WebhookWait,
)
from agent.monitors.secrets import MASK, Redactor
from agent.monitors.settings import Monitor

AFTER_TIMEOUT_S = 5.0  # the exit grace of a monitor that has just been silent for too long
MAX_TEXT = 65_536  # of an error's text in a result
TOLD_BYTES, TOLD_RATE, TOLD_BURST = 2**20, 1000, 2000  # of noise, log and stderr: bytes a run, lines a second
STDERR_TAIL = 16_384

State = Literal["starting", "greeted", "configuring", "step", "ending", "over"]
StepState = Literal["ok", "error", "timeout", "crashed", "protocol_error", "not_run"]
Cause = Literal[
    "earlier_step",
    "start_failed",
    "handshake_failed",
    "handshake_timeout",
    "incompatible",
    "secret_unresolved",
    "stopped",
]
Source = Literal["noise", "log", "stderr", "agent"]


class Say(msgspec.Struct, frozen=True):
    """Send this message. `begins_step`: tell `ordered` when it is sent, that is when the step begins."""

    text: str
    begins_step: bool = False


class StepEnded(msgspec.Struct, frozen=True, kw_only=True):
    """The one line of a planned step. `ms` is milliseconds; times are epoch seconds, null for what never began."""

    step: str
    state: StepState
    ms: float | None = None
    timed_by: Literal["monitor", "orchestrator"] | None = None
    started_at: float | None = None
    ended_at: float | None = None
    text: str | None = None
    cause: Cause | None = None
    metadata: dict[str, str | float] = {}
    metadata_raw: str | None = None
    rc: int | None = None
    signal: str | None = None
    stderr_tail: str | None = None


class Told(msgspec.Struct, frozen=True):
    """A line for the log, of the step that ran then."""

    source: Source
    level: Level
    text: str
    step: str | None = None


class Leave(msgspec.Struct, frozen=True):
    """Lead it out: `word` is said unless it is None, then it has `grace_s` before its stdin ends."""

    word: str | None
    grace_s: float


class Poll(msgspec.Struct, frozen=True):
    """Ask the webhook service for `uid` for as long as the session waits for it; what it answers goes to `webhook`."""

    uid: str


Act: TypeAlias = Say | StepEnded | Told | Leave | Poll


class Session:
    """The run. `state` and `step` tell where it is; `again` after the end: the spelling to start it once more with."""

    def __init__(
        self,
        monitor: Monitor,
        config: str,
        now: float,
        *,
        epoch: float,
        redactor: Redactor,
        spoken: Dialect | None = None,
    ) -> None:
        """`spoken` is what a monitor with dialect "auto" is known to understand."""
        self.monitor = monitor
        self.state: State = "starting"
        self.step: str | None = None
        self.dialect: Dialect = spoken or ("seed" if monitor.dialect == "seed" else "metrist")
        self.again: Dialect | None = None
        self._guesses = monitor.dialect == "auto" and spoken is None
        self.stray = self.dropped = 0
        self.has_result = False
        self._config, self._epoch, self._redactor = config, epoch, redactor
        self._plan = monitor.plan()
        self._next = 0  # of the plan: the first without a line
        self._ordered = now  # when the step began
        self._until: float | None = now + (monitor.handshake_timeout or 0)
        self._cause: Cause | None = None  # why no step was begun
        self._why = ""
        self._stderr = bytearray()
        self._refused = False  # it quoted our order
        self.waits_for: Poll | None = None  # of the step: a webhook that was not called yet
        self._told_bytes, self._tokens, self._filled, self._cut = 0, float(TOLD_BURST), now, False

    # ---- what comes in ---------------------------------------------------------------------------------------------

    def feed(self, items: Iterable[Message | Noise], now: float) -> list[Act]:
        """Take what one read completed. Results that it holds behind an order that follows from it are stray."""
        acts: list[Act] = []
        orders = self._next if self.step else None  # the step that a result of this read can be of
        for item in items:
            match item:
                case StepOk() | StepTime() | StepError():
                    if self.step is not None and orders == self._next and self.state == "step":
                        acts += self._result(item, now)
                    else:
                        self.stray += 1
                        acts += self._tell("agent", "warning", f"stray result: {_written(item)}", now)
                case Log(level, text):
                    acts += self._tell("log", level, text, now)
                case Noise(text, dropped):
                    self.dropped += dropped
                    acts += self._tell("noise", "info", text, now, cut=dropped > 0) if text else []
                case _:
                    acts += self._lead(item, now)
        return acts

    def errors(self, lines: Iterable[Noise], now: float) -> list[Act]:
        """Take lines of its stderr."""
        acts: list[Act] = []
        for line in lines:
            self.dropped += line.dropped
            acts += self._tell("stderr", "info", line.text, now, cut=line.dropped > 0) if line.text else []
        return acts

    def keep_stderr(self, data: bytes) -> None:
        """Take bytes of its stderr for the tail in results."""
        room = STDERR_TAIL + self._redactor.longest
        self._stderr += data
        if len(self._stderr) > 2 * room:
            del self._stderr[:-room]

    def ordered(self, now: float) -> None:
        """The order to run the step is sent: its time begins, which is neither ours nor that of the step before."""
        self._ordered, self._until = now, now + self._plan[self._next][1]

    def webhook(self, body: str) -> list[Act]:
        """The webhook that the step waits for was called. It may wait for another."""
        self.waits_for = None
        return [Say(f"Webhook Wait Response {body}")]

    def due(self) -> float | None:
        """When `tick` has something to do."""
        return self._until

    def tick(self, now: float) -> list[Act]:
        """Time has passed."""
        if self._until is None or now < self._until:
            return []
        self._until = None
        if self.step is None:
            limit = self.monitor.handshake_timeout
            self._fail("handshake_timeout", f"still {self.state} after {limit:g} s")
            return self._leave(now, said=False)
        timeout = self._plan[self._next][1]
        text = f"no result within {timeout:g} s"
        if self.waits_for is not None:
            text += f"; it waits for webhook {self._redactor.clean(self.waits_for.uid)}"
        elif self._guesses and not self.has_result:
            text += f"; {self._other_dialect()}"
        return [*self._end(now, "timeout", text=text), *self._leave(now, grace_s=AFTER_TIMEOUT_S)]

    def stop(self, now: float) -> list[Act]:
        """Somebody ends the run: the agent stops, or the monitor is gone from the settings."""
        if self.state in ("ending", "over"):
            return []
        self._fail("stopped", "")
        acts = self._end(now, "not_run", cause="stopped") if self.step else []
        return [*acts, *self._leave(now, said=self.state == "step")]

    def exited(self, rc: int | None, signal: str | None, now: float) -> list[Act]:
        """It is over, and all that it wrote was fed. Every step without a line gets one, unless it starts `again`."""
        acts: list[Act] = []
        how = {"rc": rc, "signal": signal, "stderr_tail": self._tail()}
        if self._guesses and self.state == "step" and not self.has_result and self._refused:
            self.again = "seed" if self.dialect == "metrist" else "metrist"
        elif self.step is not None and self.state == "step":
            text = "it ended in the step"
            if self._refused:
                text += f", and quoted the order: {self._other_dialect()}"
            elif self._guesses and not self.has_result:
                text += f"; {self._other_dialect()}"
            acts += self._end(now, "crashed", text=text, **how)
        elif self.state in ("starting", "greeted", "configuring"):
            self._fail("handshake_failed", f"it ended while {self.state}")
        if self.again is None:
            acts += self._not_run(how)
        self.state, self._until = "over", None
        return acts

    # ---- what it does ----------------------------------------------------------------------------------------------

    def _lead(self, message: Message, now: float) -> list[Act]:
        match self.state, message:
            case "starting", Started(announced):
                if not re.fullmatch(r"1(\.\d+)*", announced):
                    self._fail("incompatible", f"it announces version {announced!r}; 1.x is spoken here")
                    return self._leave(now, said=False)
                if self._guesses and announced == "1.0":
                    self.dialect = "seed"
                self.state = "greeted"
                return [Say(messages.version(self.dialect, announced))]
            case "greeted", Ready():
                self.state = "configuring"
                return [Say(f"Config {self._config}")]
            case "configuring", Configured():
                return self._order(now)
            case "step", WebhookWait(uid) if self.waits_for is None:
                self.waits_for = Poll(uid)
                return [self.waits_for] if self.monitor.webhook_url else []
            case "ending", Exit():
                return []
            case _:
                return self._tell("noise", "info", f"{_written(message)} (not expected while {self.state})", now)

    def _order(self, now: float) -> list[Act]:
        name, _ = self._plan[self._next]
        self.state, self.step = "step", name
        self.ordered(now)
        return [Say(messages.order(self.dialect, name), begins_step=True)]

    def _result(self, result: Result, now: float) -> list[Act]:
        self.has_result = True
        pairs = self._metadata(result.metadata)
        acts: list[Act]
        match result:
            case StepOk():
                acts = self._end(now, "ok", ms=(now - self._ordered) * 1000, timed_by="orchestrator", **pairs)
            case StepTime(time):
                unit = self.monitor.unit(self.dialect)
                value = messages.seconds(time, unit)
                if value is None:
                    acts = self._end(now, "protocol_error", text=self._text(f"Step Time {time}"), **pairs)
                else:
                    acts = []
                    if unit == "s" and value > now - self._ordered:
                        said = f"unit_suspect: {time} s is longer than the step took; see the setting time_unit"
                        acts += self._tell("agent", "warning", said, now)
                    acts += self._end(now, "ok", ms=value * 1000, timed_by="monitor", **pairs)
            case StepError(text):
                acts = self._end(now, "error", text=self._text(text), **pairs)
        bad = not isinstance(acts[-1], StepEnded) or acts[-1].state != "ok"
        if (bad and self.monitor.on_error == "stop") or self._next == len(self._plan):
            return [*acts, *self._leave(now)]
        return [*acts, *self._order(now)]

    def _end(self, now: float, state: StepState, **more: Any) -> list[Act]:
        """The line of the step that runs."""
        name, _ = self._plan[self._next]
        self._next += 1
        self.waits_for = None
        began, ended = self._epoch + self._ordered, self._epoch + now
        return [StepEnded(step=name, state=state, started_at=began, ended_at=ended, **more)]

    def _leave(self, now: float, *, grace_s: float | None = None, said: bool = True) -> list[Act]:
        self.state, self._until = "ending", None
        word = messages.leave(self.dialect, self.monitor.cleanup) if said else None
        grace = self.monitor.exit_grace if grace_s is None else min(grace_s, self.monitor.exit_grace or 0.0)
        return [Leave(word, (grace or 0.0) if said else 0.0)]

    def _other_dialect(self) -> str:
        return f"it may speak another dialect than {self.dialect} (setting dialect)"

    def _fail(self, cause: Cause, why: str) -> None:
        self._cause, self._why = cause, why

    def _not_run(self, how: dict[str, Any]) -> list[Act]:
        rest = [name for name, _ in self._plan[self._next :]]
        self._next = len(self._plan)
        cause = self._cause or "earlier_step"
        told = how if cause in ("handshake_failed", "handshake_timeout", "incompatible") else {}
        why = self._redactor.clean(self._why) or None
        return [StepEnded(step=name, state="not_run", cause=cause, text=why, **told) for name in rest]

    # ---- what is told ----------------------------------------------------------------------------------------------

    def _metadata(self, word: str) -> dict[str, Any]:
        pairs = messages.metadata(word)
        clean = {key: self._redactor.clean(text) if isinstance(text, str) else text for key, text in pairs.items()}
        raw = self._redactor.clean(word) if clean == pairs else MASK
        return {"metadata": clean, "metadata_raw": raw or None}

    def _text(self, text: str) -> str:
        cut = text[:MAX_TEXT]
        self.dropped += len(text[MAX_TEXT:].encode())
        return self._redactor.clean(cut, cut=len(cut) < len(text))

    def _tail(self) -> str | None:
        """The last bytes of its stderr; a secret at the cut goes whole."""
        if not self._stderr:
            return None
        raw = bytes(self._stderr[-STDERR_TAIL - self._redactor.longest :])
        text = self._redactor.clean_end(raw.decode(errors="replace"), cut=len(raw) > STDERR_TAIL)
        return text.encode()[-STDERR_TAIL:].decode(errors="ignore")

    def _tell(self, source: Source, level: Level, text: str, now: float, *, cut: bool = False) -> list[Act]:
        """Forward lines, within the limits of a run; what goes beyond them is counted."""
        if source != "agent" and '"Run Step ' in text.replace("Run step", "Run Step"):
            self._refused = self._refused or self.state == "step"
        acts: list[Act] = []
        for line in text.splitlines() or [""]:
            self._tokens = min(float(TOLD_BURST), self._tokens + (now - self._filled) * TOLD_RATE)
            self._filled = now
            size = len(line.encode())
            if self._tokens < 1 or self._told_bytes + min(size, MAX_LINE) > TOLD_BYTES:
                self.dropped += size
                if not self._cut:
                    self._cut = True
                    limit = f"more than {TOLD_RATE} lines a second or {TOLD_BYTES} bytes a run are not forwarded"
                    acts.append(Told("agent", "warning", limit, self.step))
                continue
            self._tokens -= 1
            clean = self._redactor.clean(line, cut=cut)
            if len(clean) > MAX_LINE:
                self.dropped += len(clean) - MAX_LINE
                clean = clean[:MAX_LINE]
            self._told_bytes += size
            acts.append(Told(source, level, clean, self.step))
        return acts


def config_text(config: dict[str, Any]) -> str:
    """The configuration as it is sent: ASCII only, since a real library counts characters."""
    return json.dumps(config, separators=(",", ":"))


def _written(message: msgspec.Struct) -> str:
    return " ".join([type(message).__name__, *(str(value) for value in msgspec.structs.astuple(message) if value)])


def refused(monitor: Monitor, cause: Cause, why: str) -> list[StepEnded]:
    """The lines of a run that was never started."""
    return [StepEnded(step=name, state="not_run", cause=cause, text=why) for name, _ in monitor.plan()]
