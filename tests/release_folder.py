"""Release folders as `make dist` makes them, with a shell script for the frozen agent, and how to install one."""

import hashlib
import os
from pathlib import Path

from agent.install import steps
from agent.install.service import Init, Needs, Service, user_for
from agent.install.steps import Job

# It answers what an installer asks. lib/selftest is what a failing selftest says; lib/ctl is a script of its own.
AGENT = """\
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
case "$1" in
--version) echo '{{"version": "{version}"}}' ;;
--selftest) echo "$*" >"$here/asked"; [ ! -e "$here/lib/selftest" ] || {{ cat "$here/lib/selftest"; exit 1; }} ;;
ctl) [ ! -e "$here/lib/ctl" ] || . "$here/lib/ctl"; echo "cannot reach it" >&2; exit 3 ;;
esac
"""


def make_release(folder: Path, version: str, **files: str) -> Path:
    """A release of that version; `files` are more files of its lib/."""
    (folder / "lib/agent/monitors/examples").mkdir(parents=True)
    (folder / "agent").write_text(AGENT.format(version=version))
    (folder / "agent").chmod(0o755)
    for name, text in {"code": f"of {version}\n" * 1000, "agent/monitors/sdk.py": "# the library\n", **files}.items():
        (folder / "lib" / name).write_text(text)
    (folder / "lib/agent/monitors/examples/look.sh").write_text("#!/bin/sh\n")
    (folder / "lib/agent/monitors/examples/look.sh").chmod(0o755)
    (folder / "lib/libx.so").symlink_to("code")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    sums = "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    (folder / "lib/SHA256SUMS").write_text(sums)
    for path in (*map(folder.joinpath, names), folder / "lib/SHA256SUMS"):
        path.chmod(0o755 if os.access(path, os.X_OK) else 0o644)  # whatever the umask is
    return folder


def tree(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Mode and bytes of each file, or where a link points to, by its path."""
    return {
        str(path.relative_to(folder)): (0, str(path.readlink()))
        if path.is_symlink()
        else (path.stat().st_mode & 0o777, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_symlink() or (path.is_file() and path.name != "asked")
    }


def job(root: Path, init: Init = "none", user: str = "root", *, now: bool = False) -> Job:
    """An installation into an image."""
    made = Service(init=init, user=user_for(init, user, root), prefix=Path("/opt/agent"), root=root, needs=Needs())
    return Job(service=made, state_dir=root / "var/lib/agent", now=now)


def install(of: Job, source: Path, version: str) -> list[str]:
    """Every step of it; what was done."""
    done = []
    with steps.alone(of):
        for what, do in steps.install(of, source, version):
            do()
            done.append(what)
    return done
