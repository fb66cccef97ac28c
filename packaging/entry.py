"""What the frozen agent starts with."""

import sys

from agent.__main__ import main

sys.exit(main())
