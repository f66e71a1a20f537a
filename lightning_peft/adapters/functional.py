"""The adapter's products, in as few passes over activations as there are products.

Written as formulas, ``y = W x + s B gate(A dropout(x))`` makes autograd keep the dropped input and
its mask in full precision, sum two gradients of the input, and pass over the output once for the
scaling and once for the sum. The functions here save the input (which layers that share it save
once), the rank activations, and one byte for each element of a dropout mask; sums and scalings are
part of a product (``addmm``). :func:`base_and_down` and :func:`add_up` stand before and after a
gate; :func:`lora_linear` is the layer without one, in one call, since calls cost too.

Values are those of the formula, to the rounding of a sum's order. Gradients of gradients are
refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def _rows(x: Tensor) -> Tensor:
    """(..., d) as (n, d)."""
    return x[None] if x.dim() == 1 else x.flatten(0, -2)  # reshape refuses d = 0


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """``keep ⊙ x``, with a mask of 0 and 1 in any dtype."""
    return x * keep.to(x.dtype)  # converting first is faster than a product of two dtypes


@dataclass(frozen=True)
class Kept:
    """What dropout keeps of an input x.

    Attributes:
        mask: 0 and 1 in any dtype, the shape of x.
        scale: Of what is kept, 1 / (1 - p).
        product: Computes ``mask ⊙ x``; in the backward pass again, so that it need not be saved.
    """

    mask: Tensor
    scale: float = 1.0
    product: Callable[[Tensor, Tensor], Tensor] = masked


def _parts(kept: Kept | None) -> tuple[Any, ...]:
    """Mask, scale and product for autograd's functions, which save tensors only if given bare."""
    return (None, 1.0, masked) if kept is None else (kept.mask, kept.scale, kept.product)


class _DownFunction(torch.autograd.Function):
    """``(W x + b, scale · A (keep ⊙ x))``; W and b frozen, or W None for the second alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_A: Tensor,
        keep: Tensor | None,
        scale: float,
        product: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor | None, Tensor]:
        # In rows: a view made in here could not be added to in place.
        y = None if weight is None else F.linear(_rows(x), weight, bias)
        read = x.to(lora_A.dtype)
        z = _rows(read if keep is None else product(read, keep)) @ lora_A.T  # (n, rank)
        if scale != 1:
            z *= scale
        # The input is for the gradient of A alone, and is the largest thing that is kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, lora_A, keep)
        ctx.scale, ctx.product, ctx.x = scale, product, (x.dtype, x.shape)
        return y, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, keep = ctx.saved_tensors
        if ctx.scale != 1:
            grad_z = grad_z * ctx.scale
        grad_A = grad_x = None
        if ctx.needs_input_grad[3]:
            read = x.to(lora_A.dtype)
            read = read if keep is None else ctx.product(read, keep)
            grad_A = grad_z.T @ _rows(read)  # (rank, d_in)
        if ctx.needs_input_grad[0]:
            through_W = None if weight is None or grad_y is None else (grad_y, weight)
            flat = None if keep is None else _rows(keep)
            dtype, shape = ctx.x
            grad_x = _grad_x(through_W, grad_z, lora_A, flat, dtype).view(shape)
        return grad_x, None, None, grad_A, None, None, None


def _grad_x(
    through_W: tuple[Tensor, Tensor] | None,
    grad_z: Tensor,
    lora_A: Tensor,
    keep: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient of the input through base and A, (n, d_in)."""
    if through_W is not None and keep is None and lora_A.dtype == dtype:
        return torch.mm(*through_W).addmm_(grad_z, lora_A)
    through_A = grad_z @ lora_A
    if keep is not None:
        through_A *= keep.to(through_A.dtype)
    if through_W is None:
        return through_A.to(dtype)
    if lora_A.dtype == dtype:
        return through_A.addmm_(*through_W)
    return torch.mm(*through_W).add_(through_A.to(dtype))


def _add_change(rows: Tensor, z: Tensor, lora_B: Tensor, scaling: float) -> None:
    """``rows += s B z`` in place, (n, d_out) and (n, rank)."""
    if z.dtype == rows.dtype:
        rows.addmm_(z, lora_B.T, alpha=scaling)
    else:  # half-precision base, float32 adapter
        rows.add_((z * scaling @ lora_B.T).to(rows.dtype))


def _grad_B(rows: Tensor, z: Tensor, scaling: float) -> Tensor:
    """Gradient of B, (d_out, rank)."""
    # This way round the product is a quarter faster on CPUs, rank being the short side.
    return ((z * scaling).T @ rows).T


class _UpFunction(torch.autograd.Function):
    """``y + s B z`` of rows, (n, d_out) and (n, rank), into ``y`` itself."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        _add_change(y, z, lora_B, scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(z, lora_B)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, lora_B = ctx.saved_tensors
        rows = grad.to(lora_B.dtype)  # (n, d_out)
        grad_z = grad_B = None
        if ctx.needs_input_grad[1]:
            grad_z = (rows @ lora_B).mul_(ctx.scaling)
        if ctx.needs_input_grad[2]:
            grad_B = _grad_B(rows, z, ctx.scaling)
        return grad, grad_z, grad_B, None


class _LoRAFunction(torch.autograd.Function):
    """``W x + b + s B A (keep ⊙ x)``, W and b frozen, in rows: both steps in one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        keep: Tensor | None,
        scaling: float,
        product: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        y = F.linear(_rows(x), weight, bias)  # (n, d_out)
        read = x.to(lora_A.dtype)
        z = _rows(read if keep is None else product(read, keep)) @ lora_A.T  # (n, rank)
        _add_change(y, z, lora_B, scaling)
        # The input is for the gradient of A alone.
        kept_x = x if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(kept_x, weight, lora_A, lora_B, keep, z)
        ctx.scaling, ctx.product, ctx.x = scaling, product, (x.dtype, x.shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, keep, z = ctx.saved_tensors
        needs, rows = ctx.needs_input_grad, grad.to(lora_B.dtype)  # (n, d_out)
        grad_x = grad_A = grad_B = None
        if needs[4]:
            grad_B = _grad_B(rows, z, ctx.scaling)
        if needs[0] or needs[3]:
            grad_z = (rows @ lora_B).mul_(ctx.scaling)  # (n, rank)
        if needs[3]:
            read = x.to(lora_A.dtype)
            grad_A = grad_z.T @ _rows(read if keep is None else ctx.product(read, keep))
        if needs[0]:
            flat = None if keep is None else _rows(keep)
            dtype, shape = ctx.x
            grad_x = _grad_x((grad, weight), grad_z, lora_A, flat, dtype).view(shape)
        return grad_x, None, None, grad_A, grad_B, None, None, None


def lora_linear(
    base: nn.Module,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    kept: Kept | None = None,
) -> Tensor:
    """Compute ``W x + b + s B A dropout(x)``, (..., d_in) to (..., d_out).

    Args:
        base: The linear, of any kind.
        x: (..., d_in).
        lora_A: (rank, d_in).
        lora_B: (d_out, rank).
        scaling: s.
        kept: What dropout keeps of x; None where it keeps all.
    """
    if not is_plain(base, x):
        y, z = base_and_down(base, x, lora_A, kept)
        return add_up(y, z, lora_B, scaling, in_place=False)
    keep, scale, product = _parts(kept)
    y = _LoRAFunction.apply(
        x, base.weight, base.bias, lora_A, lora_B, keep, scaling * scale, product
    )
    return y.view(*x.shape[:-1], -1)


def base_and_down(
    base: nn.Module,
    x: Tensor,
    lora_A: Tensor,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute ``W x + b`` and ``A dropout(x)``.

    Args:
        base: The linear, of any kind.
        x: (..., d_in).
        lora_A: (rank, d_in).
        kept: What dropout keeps of x; None where it keeps all.

    Returns:
        (n, d_out), n being all of x's leading dimensions, for :func:`add_up`; and (..., rank).
    """
    weight, bias = (base.weight, base.bias) if is_plain(base, x) else (None, None)
    y, z = _DownFunction.apply(x, weight, bias, lora_A, *_parts(kept))
    return _rows(base(x)) if y is None else y, z.view(*x.shape[:-1], lora_A.shape[0])


def add_up(y: Tensor, z: Tensor, lora_B: Tensor, scaling: float, in_place: bool) -> Tensor:
    """Compute ``y + s B z``.

    Args:
        y: (n, d_out).
        z: (..., rank).
        lora_B: (d_out, rank).
        scaling: s.
        in_place: Whether ``y`` may be overwritten, being nobody else's.

    Returns:
        (..., d_out), in the dtype of ``y``.
    """
    y = _UpFunction.apply(y if in_place else y.clone(), _rows(z), lora_B, scaling)
    return y.view(*z.shape[:-1], -1)


def is_plain(base: nn.Module, x: Tensor) -> bool:
    """Whether a base is a frozen matrix product and nothing else: no hooks, no other format.

    Args:
        base: The linear.
        x: Its input.
    """
    if type(base) is not nn.Linear:
        return False
    weight, bias = base.weight, base.bias
    hooks = (
        base._forward_hooks,
        base._forward_pre_hooks,
        base._backward_hooks,
        base._backward_pre_hooks,
    )
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype == x.dtype
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not any(hooks)
    )
