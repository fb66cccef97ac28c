"""The model file on the disk: whole or as it was, whenever its writer is killed; a damaged one is set aside."""

import os
import select
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from agent.logs import modelfile
from agent.logs.model import Model, ModelDamaged, encode

MODEL = Model(classes=("a",), weights=b"weights")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "logs.model"
    assert modelfile.read(path) is None
    modelfile.write(path, MODEL)
    assert modelfile.read(path) == MODEL
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    modelfile.write(path, replace(MODEL, left_out=1))
    assert modelfile.read_or_set_aside(path) == (replace(MODEL, left_out=1), None)
    assert os.listdir(tmp_path) == ["logs.model"]


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "logs.model"
    for data in (encode(MODEL)[:-1], b"EMLM\x07\0" + bytes(100)):
        path.write_bytes(data)
        model, err = modelfile.read_or_set_aside(path)
        assert model is None
        assert isinstance(err, ModelDamaged)
        assert (tmp_path / "logs.model.bad").read_bytes() == data
        assert not path.exists()
    assert modelfile.read_or_set_aside(path) == (None, None)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match=r"is no file|Is a directory"):
            modelfile.read(path)


WRITER = """
import sys
from pathlib import Path
from agent.logs import modelfile
from agent.logs.model import Model
for number in range(1_000_000):
    modelfile.write(Path(sys.argv[1]), Model(left_out=number, templates=bytes([number % 256]) * 2_000_000))
    print(number, flush=True)
"""


def test_it_survives_a_kill_while_it_is_written(tmp_path: Path) -> None:
    path, least = tmp_path / "logs.model", 0
    for _ in range(10):
        with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(2)]
            select.select([writer.stdout], [], [], 0.002)  # a third is being written, or is just there
            writer.send_signal(signal.SIGKILL)
            least = int(lines[-1])
        model = modelfile.read(path)
        assert model is not None
        assert model.left_out >= least
        assert model.templates == bytes([model.left_out % 256]) * 2_000_000
