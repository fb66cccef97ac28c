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
