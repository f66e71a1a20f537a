"""What a run will take, from the model's configuration alone: no weight is read or downloaded.

The model is built on the meta device, adapted, and run forward and through one optimizer step
there: shapes without values. What autograd would keep for the backward pass is counted as it is
saved, so that the estimate follows the model's own code, gates and masks included.

Not counted: what a kernel needs for itself, gradients of activations, the allocator's waste,
communication buffers, and the CUDA context (about half a gigabyte).
"""

from lightning_peft.estimation.run import Estimate, estimate

__all__ = ["Estimate", "estimate"]
