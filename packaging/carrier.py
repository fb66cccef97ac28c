"""What the single file starts with: it becomes the one-folder form that it carries, which has just been unpacked.

`run/` of the unpacked files is a release folder: the executable, and a link to the rest. So both forms are one program,
and either is what `agent install` copies. Our parent removes the files when we end.
"""

import os
import sys

# The agent's own traces of its parent: the caller's LD_LIBRARY_PATH must not get lost below a second one.
environment = {name: value for name, value in os.environ.items() if not name.startswith(("_PYI_", "LD_LIBRARY_PATH"))}
if "LD_LIBRARY_PATH_ORIG" in os.environ:
    environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH_ORIG"]
executable = os.path.join(sys._MEIPASS, "run", "agent")  # type: ignore[attr-defined]  # the bootloader's
os.execve(executable, sys.argv, environment)
