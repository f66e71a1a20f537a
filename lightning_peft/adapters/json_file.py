"""Reading a file of JSON that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_peft.errors import UserError, shown


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of JSON that holds one object.

    Args:
        path: The file.

    Raises:
        UserError: If it cannot be read, is no JSON, or names a key twice.
    """

    def once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UserError(f"{path} has the key {shown(key)} twice; which counts is not said.")
            found[key] = value
        return found

    try:
        content = json.loads(path.read_bytes().decode(), object_pairs_hook=once)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}), so it is not JSON.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain one
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{path} is not JSON: {reason}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {shown(content)}, and not an object of keys and values.")
    return content
