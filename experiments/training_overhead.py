"""What ``sparse_exchange`` adds to a training step: time and memory, against the same step without.

    python experiments/training_overhead.py [--width=8] [--nodes=4] [--steps=30] [--out=FILE.json]

ResNet-20, 28x28, batch 128, nodes emulated on one device. The steps with and without take turns, so
that a drift of the machine's speed hits both alike; the figure is the median of the ratios of
neighbours. One step in ten chooses masks, as the defaults have it, and is among those measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import disco_jax as dj
from disco_jax.train.step import TrainState, train_step

WAYS: dict[str, dict[str, Any]] = {
    "uniform l2": {},
    "by cost l2": {"budget": "by_cost", "floor": 0.3},
    "taylor": {"score": "taylor"},
    "regrow gradient": {"regrow": "gradient"},
    "lasso": {"lasso": 1e-4},
}


def prepare(args: argparse.Namespace, options: dict[str, Any] | None) -> tuple[Callable, Any, Any]:
    """The step and its state; ``options`` None is the optimiser alone."""
    mesh = dj.NodeMesh(args.nodes, emulate=True)
    model = dj.models.create(
        "resnet20", mesh=mesh, width=args.width, num_classes=10, in_channels=1, rngs=nnx.Rngs(0)
    )
    tx: Any = optax.sgd(1e-2, 0.9, nesterov=True)
    batch = {
        "image": jax.random.normal(jax.random.key(0), (args.batch, 28, 28, 1)),
        "label": jnp.arange(args.batch) % 10,
    }
    if options is not None:
        if options.get("regrow"):
            dj.sparsify.allow_regrowth(model)
        costs = dj.sparsify.wire_costs(model, batch["image"])
        tx = dj.sparsify.sparse_exchange(
            tx, density=0.2, steps=10 * args.steps, costs=costs, **options
        )
    state = TrainState.create(model, tx, mesh=mesh, ema=False)
    return train_step(model, tx, state), state, batch


def memory(step: Callable, state: Any, batch: Any) -> int:
    """Bytes that the compiled step holds at its peak: arguments, results, intermediates."""
    used = jax.jit(step).lower(state, batch).compile().memory_analysis()
    return used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes


def measure(args: argparse.Namespace, options: dict[str, Any]) -> dict[str, float]:
    ways = [prepare(args, None), prepare(args, options)]
    used = [memory(*way) for way in ways]
    states = [state for _, state, _ in ways]
    seconds: list[list[float]] = [[], []]
    for i in range(args.steps + 3):
        for which in (0, 1) if i % 2 else (1, 0):
            step, _, batch = ways[which]
            start = time.perf_counter()
            states[which], loss = step(states[which], batch)
            jax.block_until_ready((states[which], loss))
            if i >= 3:
                seconds[which].append(time.perf_counter() - start)
    without, with_ = seconds
    return {
        "step_ms": round(1e3 * statistics.median(without), 2),
        "time": round(statistics.median(b / a for a, b in zip(without, with_, strict=True)), 4),
        "mean_time": round(sum(with_) / sum(without), 4),
        "memory": round(used[1] / used[0], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 8), ("nodes", 4), ("batch", 128), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = {}
    for name, options in WAYS.items():
        found[name] = measure(args, options)
        line = "  ".join(f"{key} {value}" for key, value in found[name].items())
        print(f"{name:16s} {line}", flush=True)
    if args.out:
        command = f"experiments/training_overhead.py --width={args.width} --nodes={args.nodes}"
        args.out.write_text(json.dumps({"command": command, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
