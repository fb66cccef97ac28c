"""The commands that bring a suite's files from git. Pure.

Source: protocols/suites.md, "Limits and security" (git only by https and ssh, no prompts).
"""

from pathlib import Path
from typing import Final

from agent.suites.messages import Source

# Neither another transport, nor a question to a terminal that nobody sits at, nor a hook of somebody's template.
_CONFIG: Final = (
    "protocol.allow=never",
    "protocol.https.allow=always",
    "protocol.ssh.allow=always",
    "core.sshCommand=ssh -oBatchMode=yes",
    "core.askPass=true",
    "credential.interactive=false",
    "core.hooksPath=/dev/null",
    "advice.detachedHead=false",
)


def git_commands(source: Source, target: Path) -> list[tuple[str, ...]]:
    """What to run, in order, so that `target` holds the files of a checked git source. Each fails with a code.

    Set GIT_TERMINAL_PROMPT=0 in the environment too, for gits that do not know credential.interactive.
    """
    git = ("git", *(word for setting in _CONFIG for word in ("-c", setting)))
    there = (*git, "-C", str(target))
    fetch = ("fetch", "--quiet", "--no-tags", "--no-recurse-submodules", f"--depth={source.depth}", "--")
    return [
        (*git, "init", "--quiet", "--template=", str(target)),
        (*there, *fetch, str(source.git), source.ref or "HEAD"),
        (*there, "checkout", "--quiet", "--detach", "FETCH_HEAD"),
    ]
