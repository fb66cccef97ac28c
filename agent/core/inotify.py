"""The kernel's inotify: the one descriptor of a follower of files, and the end of a watch.

Source: inotify(7); protocols/logs.md 5; protocols/emissary.md, "Entitlement and file monitor".
"""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from inotify_simple import INotify

log = logging.getLogger(__name__)

_NONE_LEFT = (errno.EMFILE, errno.ENOSYS)  # fs.inotify.max_user_instances is reached; a kernel without it


@contextmanager
def open_inotify() -> Iterator[INotify | None]:
    """An instance that never blocks, until the block ends. None where the kernel gives none: who follows has to poll.

    Raises OSError for what polling would not mend.
    """
    try:
        notify = INotify(nonblocking=True)  # type: ignore[no-untyped-call]  # it has no annotations
    except OSError as err:
        if err.errno not in _NONE_LEFT:
            raise
        log.warning("no inotify instance, polling error=%s", err)
        yield None
        return
    with notify:
        yield notify


def unwatch(notify: INotify, wd: int) -> None:
    """End a watch; one that the kernel has ended before, with its directory, is no error."""
    try:
        notify.rm_watch(wd)  # type: ignore[no-untyped-call]  # it has no annotations
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
