"""What strategies ask of several devices, whatever engine runs them.

Engines keep parameters, gradients and optimizer state whole (one device, DDP), whole with flat
shares of gradients and moments (ZeRO-1 and 2), or in shares altogether (ZeRO-3, FSDP2). Nobody
outside of this folder has to know: a strategy asks for the full gradient, for a sum over processes,
for one draw that all take, and has all processes compare what they decided; on one process each of
these is the plain thing and costs nothing.

Every function that returns something full or reduced is a collective: all processes call it, in
the same order. The Lightning strategies that start the engines stand in
:mod:`lightning_peft.engines`.
"""

from lightning_peft.distributed.fsdp import whole
from lightning_peft.distributed.optimizers import (
    load_optimizer_state,
    optimizer_state,
    parameters_of,
)
from lightning_peft.distributed.parameters import (
    Change,
    gathered,
    gradient,
    gradient_norm,
    is_cut,
    moments,
    refuse_packed,
    resizable,
    rewrite,
    shape,
    value,
    write,
    write_moment,
)
from lightning_peft.distributed.processes import (
    assert_agreement,
    average_gradients,
    everywhere,
    from_first,
    is_distributed,
    largest,
    leave,
    mean,
    process_index,
    shared_out,
    total,
    world_size,
)
from lightning_peft.distributed.zero import mark_flat

rank = process_index  # its name before, which strategies may have

__all__ = [
    "Change",
    "assert_agreement",
    "average_gradients",
    "everywhere",
    "from_first",
    "gathered",
    "gradient",
    "gradient_norm",
    "is_cut",
    "is_distributed",
    "largest",
    "leave",
    "load_optimizer_state",
    "mark_flat",
    "mean",
    "moments",
    "optimizer_state",
    "parameters_of",
    "process_index",
    "rank",
    "refuse_packed",
    "resizable",
    "rewrite",
    "shape",
    "shared_out",
    "total",
    "value",
    "whole",
    "world_size",
    "write",
    "write_moment",
]
