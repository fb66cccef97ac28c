#!/usr/bin/env python3
"""A monitor with the library: does a web server answer, and how fast?  config = { Url = "http://127.0.0.1:8080/" }"""

import os
import sys
import time
import urllib.request

sys.path.insert(0, os.environ.get("EMISSARY_SDK", os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")))
import sdk


def get(config: dict[str, str]) -> sdk.Timed:
    """The whole page, timed without the import of anything."""
    began = time.monotonic()
    with urllib.request.urlopen(config["Url"], timeout=10) as answer:
        size = len(answer.read())
    return sdk.Timed(time.monotonic() - began, {"status": answer.status, "bytes": size})


def head(config: dict[str, str]) -> None:
    """Headers only; the orchestrator takes the time."""
    request = urllib.request.Request(config["Url"], method="HEAD")
    with urllib.request.urlopen(request, timeout=10) as answer:
        sdk.log_info(f"{answer.status} {answer.headers.get('Server', 'a server without a name')}")


if __name__ == "__main__":
    sdk.run({"Get": get, "Head": head})
