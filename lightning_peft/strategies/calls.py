"""Somebody who acts before the first optimizer step, or at each, must not be forgotten in silence.

In one's own loop two methods have to be called around each ``optimizer.step()``. Whoever forgets
them would train plain LoRA under another name. A :class:`CallWatch` notes the calls, sees each step
of an optimizer that trains given parameters, and raises at the first one without them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class CallWatch:
    """Raises where an optimizer steps and calls that belong to the step were not made.

    Args:
        owner: Who is to be called, for the message.
        needed: Names of the calls that each step needs. What follows a step (``after_step``) is
            missed at the next one.
        parameters: Gives the parameters that make an optimizer one to watch.
        follows: Those of ``needed`` that follow a step.
        first: Called with each such optimizer once, after its first step; it may raise.

    Attributes:
        ever: Names of all calls that were noted.
    """

    def __init__(
        self,
        owner: str,
        needed: Iterable[str],
        parameters: Callable[[], Iterable[nn.Parameter]],
        follows: Iterable[str] = ("after_step",),
        first: Callable[[Optimizer], None] | None = None,
    ) -> None:
        self.owner, self.needed, self.follows = owner, set(needed), set(follows)
        self.parameters, self.first = parameters, first
        self._looked_at: set[int] = set()
        self._made: set[str] = set()
        self.ever: set[str] = set()
        self._steps = 0
        self._stepping: set[int] = set()
        self._start()

    def _start(self) -> None:
        if self.needed or self.first is not None:
            _watches.start(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch as well, as the copy of a watch (deep-copied, pickled); by other optimizers."""
        self.__dict__.update(state, _stepping=set(), _looked_at=set())
        self._start()

    def noting(self, name: str, method: Callable[..., None]) -> Callable[..., None]:
        """The same method, whose calls are noted under a name."""
        return _Noting(self, name, method)

    def made(self, name: str) -> None:
        """Note a call."""
        self._made.add(name)
        self.ever.add(name)

    def begin(self) -> None:
        """Begin anew, as before the first step."""
        self._steps = 0

    def stepped(self, optimizer: Optimizer) -> None:
        """Take notice of a step.

        Raises:
            RuntimeError: If a needed call is missing.
            Exception: What ``first`` raises.
        """
        own = {id(p) for p in self.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            return
        if self.first is not None and id(optimizer) not in self._looked_at:
            self.first(optimizer)
            self._looked_at.add(id(optimizer))
        # Where several optimizers share the parameters, the step is over when the first steps
        # again.
        if id(optimizer) not in self._stepping:
            self._stepping.add(id(optimizer))
            if len(self._stepping) > 1:
                return
        else:
            self._stepping = {id(optimizer)}
        self._steps += 1
        missing = self.needed - self._made - (self.follows if self._steps == 1 else set())
        self._made.clear()
        if missing:
            calls = " and ".join(sorted(missing, reverse=True))
            raise RuntimeError(
                f"{self.owner} acts at every step, but {calls} was "
                "not called: call strategy.before_step(model, optimizer, step) before each "
                "optimizer.step() and strategy.after_step(model, optimizer, step) after it, or "
                "have the strategy among the trainer's callbacks."
            )


class _Noting:
    """A method whose calls are noted; a class, so that what holds it can be copied."""

    def __init__(self, watch: CallWatch, name: str, method: Callable[..., None]) -> None:
        self.watch, self.name, self.method = watch, name, method

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.watch.made(self.name)
        self.method(*args, **kwargs)


class _Watches:
    """All watches that are alive, behind one hook of torch's.

    One hook serves all: a hook that removes itself, or is removed by the garbage collector, would
    change torch's collection of hooks while torch iterates over it.
    """

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[CallWatch] = weakref.WeakSet()
        self.hooked = False

    def start(self, watch: CallWatch) -> None:
        if not self.hooked:
            register_optimizer_step_post_hook(self.stepped)
            self.hooked = True
        self.alive.add(watch)

    def stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for watch in list(self.alive):
            watch.stepped(optimizer)


_watches = _Watches()
