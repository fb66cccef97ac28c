"""The command `agent`. Imports stand inside the branches: --version answers in under 50 ms and imports no trio."""

import json
import platform
import sys
from pathlib import Path

import agent
from agent.standard import hold_closed


def _commit() -> str | None:
    """The commit of the checkout this runs from, shortened; None where there is none to read. No git is started."""
    git = Path(agent.__file__).parent.parent / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        name = head.removeprefix("ref: ")
        if name == head:
            return head[:12]
        if (git / name).exists():
            return (git / name).read_text()[:12]
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line[:12] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None


def version() -> dict[str, str]:
    """What this is: version, build (what it was made from and runs on), native engine; frozen, the glibc it needs."""
    from agent.core.bundle import made, release
    from agent.core.engine import native_engine

    runs_on = f"{platform.python_implementation()} {platform.python_version()} on {sys.platform} {platform.machine()}"
    folder = release()
    of = made(folder) if folder else None
    source = f"frozen {of['commit'] or 'without git'}" if of else f"checkout {_commit() or 'without git'}"
    facts = {"version": agent.__version__, "build": f"{source}, {runs_on}", "native": native_engine()}
    return facts | {"glibc": of["glibc"]} if of else facts


def main() -> int:
    """Run the command line; returns the exit code (0 done, 1 the work failed, 2 usage, 3 a peer out of reach)."""
    hold_closed()
    argv = sys.argv[1:]
    if argv in (["--version"], ["--version", "--json"]):
        facts = version()
        needs = f"; glibc {facts['glibc']} or newer" if "glibc" in facts else ""
        text = f"emissary {facts['version']} (build {facts['build']}; native engine {facts['native']}{needs})"
        try:
            print(json.dumps(facts) if "--json" in argv else text, flush=True)
        except OSError as err:
            from agent import cli

            return cli.failed(err)
        return 0
    from agent.core.start import load_later

    load_later("difflib", "gzip", "lzma", "tempfile")  # few commands, if any, come to use them
    from agent import cli

    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
