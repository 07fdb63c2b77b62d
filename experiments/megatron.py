"""A vision transformer split over hosts as Megatron-LM does it: the rival in ``link_latency.py``.

Every host holds all tokens. It has some of the heads and some of the hidden channels of each MLP:
columns of the first product of a pair, rows of the second, whose results are summed up over the
hosts, twice a block (Shoeybi et al. 2019, arXiv 1909.08053). Layer norms, the patches and the
heads of the network are computed by every host. Written out by hand, batch 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

NODE = "node"
EPSILON = 1e-6
PIECE = 25_000  # numbers in a message: gloo sends larger ones in one direction at a time
COLUMNS = ("query", "key", "value", "dense1")
ROWS = ("out", "dense2")
Weights = dict[str, Any]  # path: array


def norm(x: Any, w: Weights, path: str) -> Any:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + EPSILON) * w[f"{path}.scale"] + w[f"{path}.bias"]


def dense(x: Any, w: Weights, path: str) -> Any:
    return x @ w[f"{path}.kernel"] + w[f"{path}.bias"]


def summed(x: Any, nodes: int) -> Any:
    """The all-reduce: of two hosts each sends what it has, in pieces, and adds what it gets.

    That is as many bytes as a ring moves, in half as many messages one after another.
    """
    if nodes > 2:
        return lax.psum(x, NODE)
    flat = x.ravel()
    pieces = [flat[i : i + PIECE] for i in range(0, flat.size, PIECE)]
    return x + jnp.concatenate([lax.ppermute(p, NODE, [(0, 1), (1, 0)]) for p in pieces]).reshape(
        x.shape
    )


def block(x: Any, w: Weights, path: str, head_dim: int, nodes: int) -> Any:
    y = norm(x, w, f"{path}.norm1")
    q, k, v = (
        dense(y, w, f"{path}.attention.{name}").reshape(1, x.shape[1], -1, head_dim)
        for name in ("query", "key", "value")
    )
    y = jax.nn.dot_product_attention(q, k, v).reshape(1, x.shape[1], -1)
    y = summed(y @ w[f"{path}.attention.out.kernel"], nodes)
    x = x + y + w[f"{path}.attention.out.bias"]
    y = jax.nn.gelu(dense(norm(x, w, f"{path}.norm2"), w, f"{path}.mlp.dense1"), approximate=False)
    y = summed(y @ w[f"{path}.mlp.dense2.kernel"], nodes)
    return x + y + w[f"{path}.mlp.dense2.bias"]


def forward(image: Any, w: Weights, depth: int, head_dim: int, nodes: int) -> Any:
    """What one host does: ``[1, size, size, 3]`` to logits, the same on all."""
    kernel = w["patches.kernel"]
    x = lax.conv_general_dilated(
        image, kernel, kernel.shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = (x + w["patches.bias"]).reshape(1, -1, kernel.shape[-1])
    x = jnp.concatenate([w["tokens.tokens"], x], 1) + w["position.embedding"]
    for i in range(depth):
        x = block(x, w, f"blocks.{i}", head_dim, nodes)
    heads = w["tokens.tokens"].shape[1]
    x = norm(x[:, :heads], w, "norm")
    return sum(dense(x[:, i], w, f"heads.{i}") for i in range(heads)) / heads


def spec(path: str) -> P:
    """Which part of a variable a host has."""
    *_, layer, kind = path.split(".")
    if layer in COLUMNS:
        return P(*[None] * (kind == "kernel"), NODE)
    return P(NODE) if layer in ROWS and kind == "kernel" else P()


def program(
    weights: Weights, head_dim: int, mesh: jax.sharding.Mesh
) -> tuple[Callable[[Any], Any], int]:
    """The compiled network on the hosts, and the bytes that it sends for an image."""
    nodes = mesh.shape[NODE]
    specs = {path: spec(path) for path in weights}

    def put(value: Any, spec: P) -> Any:
        local, sharding = np.asarray(value), jax.sharding.NamedSharding(mesh, spec)
        return jax.make_array_from_callback(local.shape, sharding, lambda part: local[part])

    placed = {path: put(value, specs[path]) for path, value in weights.items()}
    depth = len({path.split(".")[1] for path in weights if path.startswith("blocks.")})
    run = jax.jit(
        jax.shard_map(
            lambda image, w: forward(image, w, depth, head_dim, nodes),
            mesh=mesh,
            in_specs=(P(), specs),
            out_specs=P(),
            check_vma=False,
        )
    )
    _, tokens, width = weights["position.embedding"].shape
    sent = 2 * depth * 2 * (nodes - 1) * tokens * width * 4
    return lambda image: run(put(image, P()), placed), sent
