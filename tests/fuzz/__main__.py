"""`python -m tests.fuzz`: see `command`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

from fuzz.command import main

sys.exit(main())
