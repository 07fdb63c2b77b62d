"""ResNet-50 split by rows over two hosts, as MoDNN and CoEdge do it: the rival of channels.

Each host holds all the weights and computes a band of rows of every layer; before a 3x3 convolution
it needs its neighbour's next row (halo exchange). Written out by hand for two hosts, batch 1 and
224x224, with batch norm folded, and as few messages as there can be: one a 3x3 convolution, both
directions at once; stem and max pool compute a few rows twice instead.
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
DEPTHS = (3, 4, 6, 3)
Weights = dict[str, tuple[Any, Any]]  # path: kernel, bias


def conv(x: Any, weights: tuple[Any, Any], stride: int = 1, columns: int = 0) -> Any:
    """A convolution whose rows of padding are there already."""
    kernel, bias = weights
    if kernel.shape[:2] == (1, 1):
        return x[:, ::stride, ::stride] @ kernel[0, 0] + bias
    y = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(0, 0), (columns, columns)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + bias


def with_halo(x: Any, node: Any) -> Any:
    """The band with one row of the neighbour, or of zeros, above and below."""
    sent = jnp.where(node == 0, x[:, -1:], x[:, :1])
    received = lax.ppermute(sent, NODE, [(0, 1), (1, 0)])
    nothing = jnp.zeros_like(received)
    above = jnp.where(node == 0, nothing, received)
    below = jnp.where(node == 0, received, nothing)
    return jnp.concatenate([above, x, below], 1)


def stem(image: Any, weights: Weights, node: Any) -> Any:
    """7x7 and max pool of the host's rows; the image is on both hosts."""
    half = image.shape[1] // 2
    rows = jnp.pad(image, [(0, 0), (5, 5), (0, 0), (0, 0)])  # 3 for the 7x7, 2 for a row above
    mine = lax.dynamic_slice_in_dim(rows, node * half, half + 7, 1)
    y = jax.nn.relu(conv(mine, weights["conv"], 2, 3))
    # The row above the image is no row: the pool must not see it.
    y = jnp.where((node == 0) & (jnp.arange(y.shape[1]) == 0)[:, None, None], -jnp.inf, y)
    return lax.reduce_window(
        y, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (0, 0), (1, 1), (0, 0)]
    )


def block(x: Any, weights: Weights, path: str, stride: int, node: Any) -> Any:
    """A bottleneck; of an odd number of rows host 1 has one that does not exist, and is 0."""
    y = jax.nn.relu(conv(x, weights[f"{path}.conv1"]))
    odd_in, odd_out = x.shape[1] == 4, x.shape[1] == 7 and stride == 2
    if odd_in:
        y = y * _exists(y, node)
    y, shortcut = with_halo(y, node), x
    if odd_out:  # host 1 starts with an odd row: its first output is one row further down
        y = jnp.concatenate([y, jnp.zeros_like(y[:, :1])], 1)
        y = lax.dynamic_slice_in_dim(y, node, 9, 1)
        shortcut = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], 1)
        shortcut = lax.dynamic_slice_in_dim(shortcut, node, 7, 1)
    elif stride == 2:
        y = y[:, :-1]
    y = jax.nn.relu(conv(y, weights[f"{path}.conv2"], stride, 1))
    y = conv(y, weights[f"{path}.conv3"])
    if f"{path}.projection" in weights:
        shortcut = conv(shortcut, weights[f"{path}.projection"], stride)
    return jax.nn.relu(y + shortcut)


def _exists(x: Any, node: Any) -> Any:
    return ((jnp.arange(4) < 3) | (node == 0)).astype(x.dtype)[:, None, None]


def forward(image: Any, weights: Weights) -> Any:
    """What one host does: ``[1, 224, 224, 3]`` to logits, the same on both."""
    node = lax.axis_index(NODE)
    x, index = stem(image, weights, node), 0
    for stage, depth in enumerate(DEPTHS):
        for i in range(depth):
            x = block(x, weights, f"blocks.{index}", 2 if stage and i == 0 else 1, node)
            index += 1
    mean = lax.psum((x * _exists(x, node)).sum((1, 2)), NODE) / 49
    kernel, bias = weights["head"]
    return mean @ kernel + bias


def program(weights: Weights, mesh: jax.sharding.Mesh) -> tuple[Callable[[Any], Any], int]:
    """The compiled network on two nodes, and the bytes that it sends for an image."""
    everywhere = jax.sharding.NamedSharding(mesh, P())

    def put(value: Any) -> Any:
        local = np.asarray(value)
        return jax.make_array_from_callback(local.shape, everywhere, lambda part: local[part])

    placed = jax.tree.map(put, weights)
    run = jax.jit(
        jax.shard_map(forward, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    )
    sizes: list[int] = []
    for width, size, depth in zip((64, 128, 256, 512), (56, 28, 14, 7), DEPTHS, strict=True):
        before = size if width == 64 else 2 * size  # the 3x3 of a stage's first block strides
        sizes += [before * width] + [size * width] * (depth - 1)
    return lambda image: run(put(image), placed), 4 * 2 * (sum(sizes) + 2048)
