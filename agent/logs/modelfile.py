"""The model file on the disk. For threads: each function waits for the disk.

Source: protocols/logs.md 4, "Model file".
"""

import os
import stat
from pathlib import Path

from agent.core import release
from agent.core.errors import ConfigError
from agent.logs.model import MAX_SIZE, Model, ModelDamaged, decode, encode

REMEDY = "Name a file that `agent logs learn` or the service wrote."
PRIVATE = 0o600  # templates quote the logs


Mark = tuple[int, int, int]  # inode, size, and ns since 1970 of the last change


def mark(path: Path) -> Mark | None:
    """What another file at `path` would not have; None: there is none, or nobody can say."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read(path: Path) -> Model | None:
    """The model at `path`; None: there is no file. Raises ModelDamaged, and OSError for one that cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would make it wait
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is no file")
        return decode(file.read(MAX_SIZE + 1))


def named(path: Path) -> Model:
    """The model that someone names. Raises ConfigError: there is none, or it cannot be read or used."""
    try:
        model = read(path)
    except (ModelDamaged, OSError) as err:
        what = err.what if isinstance(err, ModelDamaged) else err.strerror or str(err)
        raise ConfigError(path, 0, "", what, remedy=REMEDY) from err
    if model is None:
        raise ConfigError(path, 0, "", "there is no such file", remedy=REMEDY)
    return model


def write(path: Path, model: Model) -> None:
    """Have the model at `path`, whole and on the disk when this returns; until then what was there stays.

    Raises OSError.
    """
    release.write(path, encode(model), PRIVATE)


def read_or_set_aside(path: Path) -> tuple[Model | None, ModelDamaged | None]:
    """Like read(); a damaged file is renamed to NAME.bad, the last of which is kept, and told beside None."""
    try:
        return read(path), None
    except ModelDamaged as err:
        set_aside(path)
        return None, err


def set_aside(path: Path) -> None:
    """Have the file as NAME.bad, for a person to look at. Raises OSError."""
    path.replace(path.with_name(f"{path.name}.bad"))
