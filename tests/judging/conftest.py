"""Makes the server importable, and its fixtures known."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from chat_server import files, serve, slept  # noqa: E402, F401
