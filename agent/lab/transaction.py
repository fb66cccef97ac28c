"""One transaction of SQLite, for what the lab keeps: all of it or nothing, also where the disk is full.

Source: protocols/emissary.md, "Mimir" (one transaction).
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from agent.core.errors import ActionError

UNKEPT_S = 30.0  # s until the disk is tried again, when it took nothing


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Commit what the block writes. What fails in it, or in the commit, leaves nothing, and the next one can begin.

    Raises ActionError `internal` when the disk is full or broken.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("COMMIT")
    except BaseException as err:
        if db.in_transaction:  # on a full disk SQLite may have rolled back by itself
            db.execute("ROLLBACK")
        if isinstance(err, sqlite3.OperationalError):
            raise ActionError("internal", f"this cannot be kept: {err}") from err
        raise
