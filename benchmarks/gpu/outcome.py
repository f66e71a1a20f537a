"""How a stage of a trial ended, and on which machine: one line of JSON.

    python benchmarks/gpu/outcome.py STAGE STATUS SECONDS

It needs torch alone, so that it speaks where an installation has failed too.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys

import torch

PACKAGES = ("torch", "transformers", "peft", "lightning", "lightning-peft", "bitsandbytes")
ENDS = {0: "finished", 124: "its time was up", 137: "its time was up"}


def version(package: str) -> str | None:
    """The installed version of a package, if it is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Print the line."""
    stage, status, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    told = {
        "stage": stage,
        "status": ENDS.get(status, f"failed with status {status}"),
        "seconds": seconds,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
