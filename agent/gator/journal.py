"""The messages of one layer: counted, kept in its database and messages.log, told upward or printed.

Source: protocols/gator.md, "Decisions" (`log`), "Task"; seeds/gator-websocket-api.md, "Log".
"""

import io
import logging
import sqlite3
import time
from pathlib import Path

import trio

from agent.gator.layer import Above, Shared, no_messages
from agent.gator.layerdb import MAX_LOGS, LayerDb, LogRow
from agent.gator.messages import SEVERITIES, Number, Severity

log = logging.getLogger(__name__)

MAX_MESSAGE = 65 * 1024  # characters of one message that are kept: a line of output, and that it was cut
MAX_TEXT = 64 * 1024 * 1024  # characters of messages.log
MAX_WAITING = 2000  # rows that gather before who writes them must wait for the disk
FLUSH_S = 0.5


class Journal:
    """Opened by `open`; closed with the layer. `counts` are its `msg_*` metrics."""

    def __init__(
        self, folder: Path, shared: Shared, above: Above, *, is_tier: bool, is_many: bool, forward: bool
    ) -> None:
        self.folder = folder
        self.counts: dict[str, Number] = no_messages()
        self.full = False  # the disk takes no more
        self._shared, self._above = shared, above
        self._is_tier, self._is_many, self._forward = is_tier, is_many, forward
        self._least = SEVERITIES[shared.options.least]
        self._db: LayerDb | None = None
        self._text: io.TextIOWrapper | None = None
        self._room = MAX_TEXT  # in it

    async def open(self, spec: str) -> None:
        """Make the folder, spec.yaml and the database. Raises OSError, sqlite3.Error."""
        # A job of an array waits for no disk (layerdb.py), and a thread would cost it more than it does there.
        self._db = self._open(spec) if self._is_many else await trio.to_thread.run_sync(self._open, spec)

    def _open(self, spec: str) -> LayerDb:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "spec.yaml").write_text(spec, encoding="utf-8")
        return LayerDb(self.folder / "db.sqlite", is_tier=self._is_tier, is_many=self._is_many)

    @property
    def logs(self) -> int:
        """How many messages are kept."""
        return 0 if self._db is None else self._db.logs

    @property
    def db(self) -> LayerDb:
        """The open database."""
        assert self._db is not None
        return self._db

    def say(self, severity: Severity, message: str, at: float | None = None) -> None:
        """A message of this layer or its task: counted, kept, told."""
        if len(message) > MAX_MESSAGE:
            message = f"{message[:MAX_MESSAGE]}… ({len(message) - MAX_MESSAGE} characters cut)"
        now = self._shared.clock() if at is None else at
        self.counts[f"msg_{severity.lower()}"] += 1
        if self._db is not None:
            self._keep(self._db, severity, message, now)
        self.pass_on(severity, message, now)

    def _keep(self, db: LayerDb, severity: Severity, message: str, now: float) -> None:
        number = db.log(severity, message, now)
        line = f"[{time.strftime('%H:%M:%S', time.localtime(now))}] [{severity:<7s}] {message}\n"
        had_room, self._room = self._room > 0, self._room - len(line)
        if had_room:
            try:
                if self._text is None:
                    self._text = open(self.folder / "messages.log", "w", encoding="utf-8", errors="replace")  # noqa: SIM115
                self._text.write(line if self._room > 0 else f"{line}… messages.log ends here\n")
            except OSError as err:
                self._disk_failed(err)
        if number == MAX_LOGS - 1:
            self.say("WARNING", f"more than {MAX_LOGS} messages: the database keeps no more, and only counts them")
        if had_room and self._room <= 0:
            self.say("WARNING", f"more than {MAX_TEXT} characters of messages: messages.log keeps no more")

    def pass_on(self, severity: Severity, message: str, at: float) -> None:
        """A message from below: told upward, and neither counted nor kept."""
        if self._forward and SEVERITIES[severity] >= self._least:
            self._above.log(severity, message, at)

    async def flush(self) -> None:
        """Write what gathered."""
        if self._db is not None and (self._db.waiting or self._text):
            try:
                if self._text:
                    self._text.flush()
                await trio.to_thread.run_sync(self._db.flush, self._db.take())
            except (OSError, sqlite3.Error) as err:
                self._disk_failed(err)

    async def keep_flushing(self) -> None:
        """Write every half second, until cancelled."""
        while True:
            await trio.sleep(FLUSH_S)
            await self.flush()

    async def read(self, first: int, limit: int) -> list[LogRow]:
        """Messages from that uid on."""
        await self.flush()
        if self._db is None:
            return []  # it has just ended
        try:
            return await trio.to_thread.run_sync(self._db.read_logs, first, limit)
        except (OSError, sqlite3.Error) as err:
            self._disk_failed(err)
            return []

    async def close(self) -> None:
        """Write the rest."""
        if self._db is None:
            return
        db, self._db = self._db, None
        try:
            if self._text:
                self._text.close()
        except OSError as err:
            self._disk_failed(err)
        try:
            if self._is_many:  # as in `open`
                db.close(db.take())
            else:
                await trio.to_thread.run_sync(db.close, db.take())
        except (OSError, sqlite3.Error) as err:
            self._disk_failed(err)

    def _disk_failed(self, err: Exception) -> None:
        if not self.full:
            self.full = True
            log.error("cannot write folder=%s error=%s", self.folder, err)
            self._above.log("CRITICAL", f"{self.folder}: cannot be written: {err}", self._shared.clock())
