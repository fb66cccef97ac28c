"""The commands that fetch a suite from git. Pure; agent/suites/prepare.py runs them.

Only https and ssh, no prompts, and nothing of a document can be read by git as an option.
Source: protocols/suites.md, "The suite document" (`source`), "Limits and security".
"""

from pathlib import Path

from agent.suites.messages import Source

# A repository may name others (submodules, alternates); none is followed by another way than these.
_GIT = (
    *("git", "-c", "protocol.allow=never", "-c", "protocol.https.allow=always", "-c", "protocol.ssh.allow=always"),
    *("-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-c", "advice.detachedHead=false"),
)
# What `git` is told by its environment: never to ask, and to read no settings but its own.
ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_SSH_COMMAND": "ssh -oBatchMode=yes",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null",
}


def git_commands(source: Source, target: Path) -> list[tuple[str, ...]]:
    """What to run, one after the other, so that `target` holds `ref` (HEAD without one) with `depth` commits."""
    folder = str(target)
    depth = (f"--depth={source.depth}",) if source.depth else ()
    return [
        (*_GIT, "init", "--quiet", "--", folder),
        (*_GIT, "-C", folder, "fetch", "--quiet", "--no-tags", *depth, "--", source.git or "", source.ref or "HEAD"),
        (*_GIT, "-C", folder, "checkout", "--quiet", "--detach", "FETCH_HEAD"),
    ]
