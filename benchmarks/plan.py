"""Memory and traffic of one optimizer step on many devices, from the shapes alone.

    python benchmarks/plan.py

prints the tables of ``docs/devices.md``. The formulas are compared with the bytes of real runs of
two processes in ``tests/engines/test_plan.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 2**30
# Linears of a decoder layer: (outputs, inputs) in units named below.
Shape = dict[str, int]
LLAMA_2_7B = {"hidden": 4096, "inner": 11008, "kv": 4096, "layers": 32, "vocabulary": 32000}
LLAMA_3_8B = {"hidden": 4096, "inner": 14336, "kv": 1024, "layers": 32, "vocabulary": 128256}
LLAMA_3_70B = {"hidden": 8192, "inner": 28672, "kv": 1024, "layers": 80, "vocabulary": 128256}
MODELS = {"7B": LLAMA_2_7B, "8B": LLAMA_3_8B, "70B": LLAMA_3_70B}


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the linears of one decoder layer, by kind."""
    h, inner, kv = shape["hidden"], shape["inner"], shape["kv"]
    return {
        "q_proj": (h, h),
        "k_proj": (kv, h),
        "v_proj": (kv, h),
        "o_proj": (h, h),
        "gate_proj": (inner, h),
        "up_proj": (inner, h),
        "down_proj": (h, inner),
    }


def base_parameters(shape: Shape) -> int:
    """All parameters of the base: linears, norms, embedding and output layer."""
    layer = sum(m * n for m, n in linears(shape).values()) + 2 * shape["hidden"]
    return shape["layers"] * layer + (2 * shape["vocabulary"] + 1) * shape["hidden"]


def adapter_parameters(shape: Shape, r: int, targets: tuple[str, ...] | None = None) -> int:
    """R (d_out + d_in) for each target in each layer; all seven kinds when None."""
    kinds = linears(shape)
    return shape["layers"] * r * sum(sum(kinds[name]) for name in targets or tuple(kinds))


@dataclass
class Plan:
    """Bytes on one device, and bytes that it sends and receives for one optimizer step.

    Attributes:
        weights: Of the base.
        adapters: Their values, and the flat copy that ZeRO steps.
        gradients: Of the adapters.
        moments: Of the adapters.
        step_traffic: Once for each optimizer step.
        batch_traffic: Once for each micro-batch.
    """

    weights: float
    adapters: float
    gradients: float
    moments: float
    step_traffic: float
    batch_traffic: float


def plan(
    engine: str, base: int, adapters: int, n: int, base_bytes: int = 2, embedding: int = 0
) -> Plan:
    """Plan one step.

    Args:
        engine: ``ddp``, ``zero1``, ``zero2``, ``zero3`` or ``fsdp``.
        base: Parameters of the base.
        adapters: Parameters of the adapters, float32, with two moments each (AdamW).
        n: Devices.
        base_bytes: Of one weight: 2 in bfloat16.
        embedding: Parameters of the input embedding, which ZeRO-3 does not gather once more for
            the backward pass.

    Returns:
        The plan. Rings move (n - 1) / n of a tensor for a gathering or a scattering sum, and twice
        that for a sum that all receive.
    """
    ring, values, weights = (n - 1) / n, 4.0 * adapters, float(base_bytes * base)
    if engine == "ddp":
        return Plan(weights, values, 2 * values, 2 * values, 2 * ring * values, 0.0)
    share, total, gathering = values / n, 2 * ring * values, ring * values
    if engine == "zero1":
        return Plan(weights, values + share, values, 2 * share, total + gathering, 0.0)
    if engine == "zero2":
        # DeepSpeed gives each owner its part by a sum that all receive, at every micro-batch.
        return Plan(weights, values + share, share, 2 * share, gathering, total)
    if engine not in ("zero3", "fsdp"):
        raise ValueError(f"engine must be ddp, zero1, zero2, zero3 or fsdp, got {engine!r}.")
    copies = 2 if engine == "zero3" else 1  # ZeRO-3 steps a flat copy of its share
    # Forward and backward gather base and adapters; adapters' gradients are summed to owners.
    # ZeRO-3 saves some where there is room to keep weights from the forward to the backward.
    batch = 2 * ring * (weights + values) + ring * values
    if engine == "zero3":
        batch -= ring * base_bytes * embedding
    return Plan(weights / n, copies * share, share, 2 * share, 0.0, batch)


def table(model: str, r: int = 64) -> list[str]:
    """Rows of the documentation: GB on a device, and GB for a step of one micro-batch."""
    shape = MODELS[model]
    base, adapters = base_parameters(shape), adapter_parameters(shape, r)
    rows = []
    for engine in ("ddp", "zero2", "zero3", "fsdp"):
        for n in (8, 64, 512):
            p = plan(engine, base, adapters, n, embedding=shape["vocabulary"] * shape["hidden"])
            held = [p.weights, p.adapters + p.gradients + p.moments]
            cells = [f"{x / GB:.2f}" for x in (*held, p.step_traffic, p.batch_traffic)]
            rows.append(f"| {model} | {engine} | {n} | " + " | ".join(cells) + " |")
    return rows


if __name__ == "__main__":
    for name, size in MODELS.items():
        total, own = base_parameters(size), adapter_parameters(size, 64)
        print(f"{name}: {total:,} weights, {own:,} in adapters of rank 64 on all linears")
        print("\n".join(table(name)))
