"""What the tests of commands share with those of what a command does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "judging"), str(Path(__file__).parent)]

from chat_server import files, serve  # noqa: E402, F401
