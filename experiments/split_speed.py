"""Speed of the split itself: packed against the dense split and a hand-written shard_map.

    python experiments/split_speed.py [--nodes=2] [--iterations=60] [--out=FILE.json]

ResNet-50, 224x224, batch 1, one faked CPU device for each node, in one process. Programs take
turns, so that a drift of the machine's speed hits all alike; the figures are ratios of medians:

* packed (density 0.2) / dense split (density 1), the same code: what sparsity buys;
* packed / hand-written: what this library's modules cost over one ``jax.shard_map`` around
  the whole network with the same messages and kernels.
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
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import disco_jax as dj


def conv(x: jax.Array, layer: Any, stride: int, padding: int) -> jax.Array:
    """With its bias, into which the batch norm is folded; 1x1 as a product."""
    kernel = layer["kernel"].reshape(layer["kernel"].shape[-4:])
    if kernel.shape[:2] == (1, 1):
        return x[:, ::stride, ::stride] @ kernel[0, 0] + layer["bias"]
    if kernel.shape[2] == 3:  # XLA:CPU does three channels far slower than four
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, 1)])
        kernel = jnp.pad(kernel, [(0, 0)] * 2 + [(0, 1), (0, 0)])
    dims = ("NHWC", "HWIO", "NHWC")
    sides = [(padding, padding)] * 2
    y = lax.conv_general_dilated(x, kernel, (stride, stride), sides, dimension_numbers=dims)
    return y + layer["bias"]


def mine(hop: Any) -> jax.Array:
    """The channels that this node sends."""
    return jnp.asarray(hop.filled())[lax.axis_index("node")]


def send(x: jax.Array, hops: Any) -> jax.Array:
    received = [lax.ppermute(jnp.take(x, mine(h), -1, mode="clip"), "node", h.pairs) for h in hops]
    return jnp.concatenate([x, *received], -1)


def hand_written(frozen: dj.Frozen) -> Callable[[jax.Array], jax.Array]:
    """The same ResNet-50 as one function of one node's weights, inside a single shard_map."""
    model: Any = frozen.model
    strides = [int(np.max(b.conv2.strides)) for b in model.blocks]
    hops = [(b.exchange.hops, b.conv2.exchange.hops, b.conv3.exchange.hops) for b in model.blocks]
    head_hops = model.head.exchange.hops
    weights = nnx.to_pure_dict(nnx.state(model))

    def node(w: Any, image: jax.Array) -> jax.Array:
        x = jax.nn.relu(conv(image, w["conv"], 2, 3))
        sides = ((0, 0), (1, 1), (1, 1), (0, 0))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), sides)
        for i, stride in enumerate(strides):
            b = w["blocks"][i]
            first, second, third = hops[i]
            r = send(x, first)
            y = jax.nn.relu(conv(r, b["conv1"], 1, 0))
            y = jax.nn.relu(conv(send(y, second), b["conv2"], stride, 1))
            y = conv(send(y, third), b["conv3"], 1, 0)
            if "projection" in b:
                x = conv(r, b["projection"], stride, 0)
            x = jax.nn.relu(x + y)
        return send(x.mean((1, 2)), head_hops) @ w["head"]["kernel"][0] + w["head"]["bias"]

    specs = jax.tree.map(lambda v: v.sharding.spec, weights)
    mapped = jax.shard_map(
        node,
        mesh=frozen.mesh.jax_mesh,
        in_specs=(specs, P()),  # each node's share of the weights, the whole image
        out_specs=P(None, "node"),  # [1, classes/n]
        check_vma=False,
    )
    run = jax.jit(mapped)
    return lambda image: run(weights, image)


def measure(
    programs: dict[str, Callable[..., Any]], x: jax.Array, n: int
) -> dict[str, list[float]]:
    """Milliseconds of each program, in turns, after three warm-ups.

    The order is shuffled every turn: whoever runs after a program that shares its weights finds
    them in the cache.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    shuffle = np.random.default_rng(0)
    for i in range(n + 3):
        for name in shuffle.permutation(list(programs)):
            start = time.perf_counter()
            jax.block_until_ready(programs[name](x))
            if i >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def run(nodes: int, iterations: int, size: int = 224) -> dict[str, float]:
    mesh = dj.NodeMesh(nodes, emulate=False)
    model = dj.models.create("resnet50", mesh=mesh, rngs=nnx.Rngs(0))
    image = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)
    dense = dj.freeze(model, image)
    dj.sparsify.prune(model, 0.2)
    packed = dj.freeze(model, image)
    reference = hand_written(packed)
    np.testing.assert_allclose(packed(image), reference(image), rtol=1e-3, atol=1e-4)
    times = measure(
        {"dense": dense, "packed": packed, "hand_written": reference}, image, iterations
    )
    medians = {f"{name}_ms": statistics.median(t) for name, t in times.items()}
    return {
        "nodes": nodes,
        **medians,
        "packed/dense": medians["packed_ms"] / medians["dense_ms"],
        "packed/hand_written": medians["packed_ms"] / medians["hand_written_ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = run(args.nodes, args.iterations)
    for name, value in result.items():
        print(f"{name:22} {value:.3f}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
