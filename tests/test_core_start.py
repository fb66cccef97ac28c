"""Modules that wait for their first use: nothing of them is loaded before, and nothing is missed after."""

import subprocess
import sys

from agent.core.start import load_later

SCRIPT = """
import sys
from agent.core.start import load_later
load_later("ssl", "wave")
import ssl, wave
assert not {"_ssl", "chunk"} & sys.modules.keys()
USE
assert sys.modules["ssl"].SSLContext is ssl.SSLContext
print("_ssl" in sys.modules, type(ssl).__name__, hasattr(wave, "__path__"))
"""


def run(use: str) -> str:
    argv = [sys.executable, "-W", "ignore", "-c", SCRIPT.replace("USE", use)]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_a_module_is_loaded_when_a_name_of_it_is_asked_for() -> None:
    assert run("ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)") == "True module False\n"


def test_a_name_taken_out_of_it_loads_it() -> None:
    use = "from ssl import SSLContext; assert isinstance(ssl.create_default_context(), SSLContext)"
    assert run(use) == "True module False\n"


def test_a_module_that_is_there_stays() -> None:
    before = sys.modules["subprocess"]
    load_later("subprocess")
    assert sys.modules["subprocess"] is before


def test_a_name_that_it_does_not_have_is_missed() -> None:
    use = "\ntry:\n    ssl.no_such_name\nexcept AttributeError as err:\n    assert 'no_such_name' in str(err)\n"
    assert run(use) == "True module False\n"


def test_what_is_ready_does_not_load_it() -> None:
    script = """
import sys
from agent.core.start import load_later
load_later("wave", "colorsys", hue=7)
import wave
from colorsys import hue
assert (wave.hue, hue) == (7, 7)
assert "chunk" not in sys.modules
assert wave.Error.__module__ == "wave"
assert sys.modules["wave"].Error is wave.Error
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


def test_the_service_imports_no_openssl_and_digests_without() -> None:
    script = """
import sys
from agent.core.start import prepare
prepare()
import hashlib, agent.app
assert hashlib.blake2b(b"", digest_size=6).hexdigest() == "ddd9c40767f9"
assert not {"_ssl", "_hashlib", "email.message", "zipfile", "yaml.loader"} & sys.modules.keys(), sys.modules
assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_code_that_only_the_start_went_through_leaves_memory() -> None:
    script = """
import sys
from pathlib import Path
from agent.core import start
def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssFile:")[2].split()[0])
import decimal, sqlite3, ssl
ssl.create_default_context()
before = resident()
start.settle()
after = resident()
assert after < before, (before, after)
connection = sqlite3.connect(":memory:")
assert connection.execute("SELECT 6 * 7").fetchall() == [(42,)]
assert decimal.Decimal(2).sqrt() and ssl.create_default_context()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_signals_that_come_before_anybody_listens_wait() -> None:
    script = """
import os, signal
from agent.core.start import LED_BY, heed, prepare
prepare()
for number in LED_BY:
    os.kill(os.getpid(), number)
import trio
async def main():
    with trio.open_signal_receiver(*LED_BY) as signals:
        heed()
        print(sorted([await anext(signals) for _ in LED_BY]) == sorted(LED_BY))
trio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
