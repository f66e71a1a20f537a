"""Input dropout that is drawn fast, kept as one byte for each element, and may be shared."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.adapters.functional import masked


def draw(
    shape: Sequence[int],
    keep: float,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Ones with probability ``keep``, else zeros.

    On a CPU every element takes 16 random bits, which is three times as fast as ``bernoulli_`` and
    rounds ``keep`` to a multiple of 2⁻¹⁶.

    Args:
        shape: Of the draw.
        keep: Probability of a one.
        device: Where to.
        generator: Of that device; torch's global stream when None.

    Returns:
        A tensor of that shape, uint8, which converts faster than bool.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.uint8, device=device).bernoulli_(
            keep, generator=generator
        )
    size = math.prod(shape)
    words = torch.empty((size + 3) // 4, dtype=torch.int64).random_(
        -(2**63), None, generator=generator
    )
    bits = words.view(torch.int16)[:size].view(*shape)  # uniform on [-2¹⁵, 2¹⁵)
    return bits.ge_(min(2**15 - round(keep * 2**16), 2**15 - 1)).to(torch.uint8)


class SharedDraw:
    """The latest mask, for the layers that read the same tensor one after another.

    Every layer takes one number from torch's global stream, whether it draws or finds a mask: a
    recomputation under activation checkpointing may find what the forward drew, or draw what the
    forward found. Layers that share an input must be recomputed together, like those of a block.
    """

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = 0
        self._keep: Tensor | None = None
        self._dropped: tuple[Tensor, Tensor] | None = None

    def mask(self, x: Tensor, keep: float) -> Tensor:
        """The mask of a tensor, drawn when it is first seen.

        Args:
            x: The tensor.
            keep: Probability of keeping an element.

        Returns:
            Zeros and ones, uint8, the shape of ``x``.
        """
        seed = int(torch.randint(2**62, ()))
        seen = None if self._x is None else self._x()
        if seen is not x or self._version != x._version or self._keep is None:
            self._x, self._version = weakref.ref(x), x._version
            generator = torch.Generator(x.device).manual_seed(seed)
            self._keep = draw(x.shape, keep, x.device, generator)
        return self._keep

    def dropped(self, x: Tensor, keep: Tensor) -> Tensor:
        """``keep ⊙ x``, made once for the layers that ask for it one after another.

        Args:
            x: The tensor that the mask was drawn for.
            keep: The mask, which is held, so that its memory is nobody else's.
        """
        last = self._dropped
        if last is None or last[0].data_ptr() != keep.data_ptr() or last[1].dtype != x.dtype:
            self._dropped = last = keep, masked(x, keep)
        return last[1]


class InputDropout(nn.Dropout):
    """``nn.Dropout`` that can give its mask instead of applying it.

    Args:
        p: Probability of dropping an element, in [0, 1).

    Attributes:
        shared: Where layers that read the same input share one draw, what they share; else None.
    """

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.shared: SharedDraw | None = None

    def mask(self, x: Tensor) -> Tensor | None:
        """What is kept of an input, ones and zeros in its shape; None where nothing is dropped."""
        if not self.training or self.p == 0:
            return None
        if self.shared is not None:
            return self.shared.mask(x, 1 - self.p)
        return draw(x.shape, 1 - self.p, x.device)

    def apply_mask(self, x: Tensor, keep: Tensor) -> Tensor:
        """``keep ⊙ x``, without the scaling of what is kept."""
        return masked(x, keep) if self.shared is None else self.shared.dropped(x, keep)

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x, (..., d_in) to (..., d_in), and scale the rest by 1 / (1 - p)."""
        if torch.compiler.is_compiling():
            return F.dropout(x, self.p, self.training)
        keep = self.mask(x)
        return x if keep is None else masked(x, keep) * (1 / (1 - self.p))


def share_draws(modules: Iterable[nn.Module]) -> None:
    """Let all input dropouts among some modules share the draw of an input that they share."""
    shared = SharedDraw()
    for module in modules:
        if isinstance(module, InputDropout):
            module.shared = shared
