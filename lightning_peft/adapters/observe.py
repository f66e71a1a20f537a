"""Watching what enters the adapted layers, while somebody else runs the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.attach import adapter_layers

Observer = Callable[[str, AdaptedLayer, Tensor], None]


class observe_inputs(AbstractContextManager["observe_inputs"]):  # noqa: N801 - reads as a verb
    """Call an observer with the attended inputs of every adapted layer, once for each forward.

    The attention mask is read off the model's own keyword argument ``attention_mask`` (batch,
    tokens), or off the ``position_ids`` of packed rows; without them, or where a layer sees another
    shape, every token counts. A recomputation under activation checkpointing is not a second
    forward and is not seen.

    Args:
        model: The adapted model, whose forward somebody calls.
        observer: Called without gradients as ``observer(name, layer, x)``, x (tokens, d_in).

    Example::

        norms = {}
        with observe_inputs(model, lambda n, layer, x: norms.update({n: layer.delta_sq_norm(x)})):
            model(**batch)

    Where the time to watch is no block of code, :meth:`start` and :meth:`stop` do the same.
    """

    def __init__(self, model: nn.Module, observer: Observer) -> None:
        self.model, self.observer = model, observer
        self._handles: list[RemovableHandle] = []
        self._shape: torch.Size | None = None
        self._attended: Any = None
        self._seen: set[str] = set()
        self._inside = False

    def start(self) -> observe_inputs:
        """Begin to watch."""
        hook = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        end = self.model.register_forward_hook(self._end, always_call=True)
        self._handles = [hook, end]
        for name, layer in adapter_layers(self.model).items():
            # Of bound methods, so that the copy of a model tells the copy of this object.
            look = functools.partial(self._look, name)
            self._handles.append(layer.register_forward_pre_hook(look))
        return self

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> observe_inputs:
        """Begin to watch."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hooks."""
        self.stop()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask: Any = kwargs.get("attention_mask")
        if mask is None and kwargs.get("position_ids") is not None:
            mask = _of_packed_rows(kwargs["position_ids"])
        self._shape = mask.shape if mask is not None and mask.dim() == 2 else None
        # Positions are found once, since finding them waits for the device.
        self._attended = None if self._shape is None else mask.reshape(-1).nonzero()[:, 0]
        self._seen = set()
        self._inside = True

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inside = False

    @torch.no_grad()
    def _look(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Recomputation runs in the backward pass, outside the model's forward.
        if not self._inside or name in self._seen:
            return
        self._seen.add(name)
        x = args[0].detach()
        tokens = x.reshape(-1, x.shape[-1])  # (batch * tokens, d_in)
        if self._shape == x.shape[:-1]:
            tokens = tokens.index_select(0, self._attended.to(x.device))
        # What is summed over thousands of tokens is computed in the adapters' own precision.
        with torch.autocast(x.device.type, enabled=False):
            self.observer(name, layer, tokens)  # type: ignore[arg-type]


def _of_packed_rows(position_ids: Tensor) -> Tensor:
    """Which tokens of packed rows count: not those of padding, documents of a single token."""
    begins = position_ids == 0
    ends = torch.cat([begins[:, 1:], torch.ones_like(begins[:, :1])], 1)
    return ~(begins & ends)
