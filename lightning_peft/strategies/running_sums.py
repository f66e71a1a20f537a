"""Sums over forwards and steps since the last decision, of which each process sees a part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_peft import distributed

State = dict[str, dict[str, Tensor]]


class RunningSums(dict[str, dict[str, Tensor]]):
    """For each layer tensors by key, to which more is added.

    Args:
        of_each: The keys of which each process has its own part; all else is equal on all.
    """

    def __init__(self, of_each: Sequence[str]) -> None:
        super().__init__()
        self.of_each = tuple(of_each)

    def add(self, layer: str, key: str, value: Tensor) -> None:
        """Add a tensor to a layer's sum."""
        sums = self.setdefault(layer, {})
        # Sums from a checkpoint come on the CPU.
        sums[key] = sums[key].to(value.device) + value if key in sums else value

    def mean(self, layer: str, key: str, count: str) -> Tensor | None:
        """A sum over its count, both by key; None where nothing was added."""
        sums = self.get(layer, {})
        return sums[key] / sums[count].to(sums[key].device) if key in sums else None

    def share(self, zeros: dict[str, dict[str, Tensor]], count: str) -> None:
        """Add up over all processes what each has seen.

        Args:
            zeros: For each layer a zero of each key, for a process that has seen none, on the
                device to add on.
            count: The key that is zero where no process has seen anything; such a layer gets none.
        """
        seen = []
        for layer, parts in zeros.items():
            # A layer that no forward here has visited may have been visited elsewhere.
            sums = self.setdefault(layer, {})
            for key, zero in parts.items():
                sums.setdefault(key, zero)
                seen.append((sums, key, zero.device))
        shared = distributed.total([sums[key].to(device) for sums, key, device in seen])
        for (sums, key, _), value in zip(seen, shared, strict=True):
            sums[key] = value
        for layer, parts in zeros.items():
            if not self[layer][count]:
                for key in parts:
                    del self[layer][key]
                if not self[layer]:
                    del self[layer]

    def state(self) -> State:
        """What a checkpoint keeps of this process' sums."""
        return {layer: dict(sums) for layer, sums in self.items()}

    def restore(self, states: Sequence[State]) -> None:
        """Go on from the states of all processes of the run that was stopped.

        On as many processes each goes on with its own sums, exactly; on another number the first
        goes on with those of all.
        """
        self.clear()
        process, processes = distributed.process_index(), distributed.world_size()
        own = states[process] if len(states) == processes else self._common(states[0])
        self.update({layer: dict(sums) for layer, sums in own.items()})
        if len(states) != processes and process == 0:
            self._add_all(states)

    def _common(self, state: State) -> State:
        return {n: {k: v for k, v in s.items() if k not in self.of_each} for n, s in state.items()}

    def _add_all(self, states: Iterable[State]) -> None:
        for state in states:
            for layer, entry in state.items():
                for key in self.of_each:
                    if key in entry:
                        self.add(layer, key, entry[key])
