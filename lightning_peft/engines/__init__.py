"""Lightning's engines for many devices, as adapters need them.

``ddp`` is Lightning's own. :class:`DeepSpeed` and :class:`FSDP` are Lightning's with changes, and
run on CPUs too. Their checkpoints are one file in the form of one device's (adapters, moments,
counters; no base weights), so that every engine goes on from any other's, on any number of devices.
What else is to be known of an engine, whichever it is, says :func:`traits`.
"""

from lightning_peft.engines.deepspeed import DeepSpeed
from lightning_peft.engines.fsdp import FSDP
from lightning_peft.engines.needs import (
    CHANGING_SIZES,
    ENGINES,
    WEIGHTS_AT_ATTACH,
    WHOLE_STEPS,
    WHOLE_WEIGHTS,
    Traits,
    check,
    traits,
)
from lightning_peft.engines.processes import explain

__all__ = [
    "CHANGING_SIZES",
    "ENGINES",
    "FSDP",
    "WEIGHTS_AT_ATTACH",
    "WHOLE_STEPS",
    "WHOLE_WEIGHTS",
    "DeepSpeed",
    "Traits",
    "check",
    "explain",
    "traits",
]
