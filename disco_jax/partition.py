"""Who owns which channel, and computations that stay on the node that owns their input."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from disco_jax.errors import DiscoError, require
from disco_jax.mesh import DATA, NODE, NodeMesh


def padded(features: int, nodes: int, *, pad: bool, unit: int = 1, name: str = "features") -> int:
    """The number of channels after dead ones are appended so that the nodes share them equally.

    Channels of one ``unit``, such as an attention head, stay together on a node.

    Raises:
      DiscoError: if ``features`` does not divide by ``unit``, or by ``nodes`` times ``unit`` while
        ``pad`` is False.

    >>> padded(63, 2, pad=True), padded(3 * 64, 2, pad=True, unit=64)
    (64, 256)
    """
    require(features >= 1, f"`{name}` (={features}) must be at least 1")
    require(
        features % unit == 0,
        f"`{name}` (={features}) must be divisible by `unit` (={unit}), the number of channels "
        "that stay together; choose a multiple",
    )
    missing = -features % (nodes * unit)
    if missing and not pad:
        dead = f"{missing} dead channel" + "s" * (missing > 1)
        times = f" times `unit` (={unit})" if unit > 1 else ""
        raise DiscoError(
            f"`{name}` (={features}) must be divisible by `nodes` (={nodes}){times}; "
            f"pass pad=True to add {dead}"
        )
    return features + missing


def pad_axis(x: Shaped[Array, "..."], size: int, axis: int) -> Shaped[Array, "..."]:
    """Appends zeros to ``axis`` until it has ``size`` entries."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths) if size > x.shape[axis] else x


def pad_channels(x: Float[Array, "... c"], mesh: NodeMesh) -> Float[Array, "... padded"]:
    """Appends dead (zero) channels to an activation so that the nodes share them equally."""
    return pad_axis(x, padded(x.shape[-1], mesh.nodes, pad=True), -1)


def owned(features: int, nodes: int) -> np.ndarray:
    """``bool[node, channel]``: True where the node owns the channel.

    >>> owned(4, 2).astype(int).tolist()
    [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    owner = np.arange(features) // (features // nodes)
    return owner[None, :] == np.arange(nodes)[:, None]


def activation_spec(ndim: int, mesh: NodeMesh) -> P:
    """Batch split over ``data``, channels (the last axis) over ``node``."""
    return P(*batch_spec(ndim - 1, mesh), NODE)


def row_spec(ndim: int, mesh: NodeMesh) -> P:
    """Batch split over ``data``, rows (the second axis) over ``node``."""
    batch, _, *rest = batch_spec(ndim, mesh)
    return P(batch, NODE, *rest)


def batch_spec(ndim: int, mesh: NodeMesh) -> P:
    """Batch split over ``data``; every node holds all channels.

    An axis of size 1 is not named: XLA:CPU would sum gradients over it, which copies them all.
    """
    return P(DATA if mesh.data > 1 else None, *[None] * (ndim - 1))


def kernel_spec(ndim: int) -> P:
    """Split over ``node`` along the output channels (the last axis)."""
    return P(*[None] * (ndim - 1), NODE)


def check_batch(
    x: Shaped[Array | np.ndarray, "b ..."] | jax.ShapeDtypeStruct, mesh: NodeMesh
) -> None:
    """Refuses a batch that the data axis cannot share equally."""
    require(
        len(x.shape) >= 2 and x.shape[0] % mesh.data == 0,
        f"`batch` (={x.shape[0] if x.shape else 0}, from an input of shape {x.shape}) must be "
        f"divisible by `data` (={mesh.data}) of the NodeMesh; choose another batch size or data=1",
    )


def per_node(
    fn: Callable[..., Array], *xs: Float[Array, "b ... c"], mesh: NodeMesh
) -> Float[Array, "b ... c2"]:
    """Applies ``fn`` to every node's own channels; nothing crosses a link.

    ``fn`` maps blocks ``[b, ..., c/n]`` (one for each of ``xs``) to a block ``[b, ..., c2/n]``;
    it may change every axis but the batch.

    >>> mesh = NodeMesh(nodes=2, emulate=True)
    >>> per_node(lambda x: x[..., ::-1], jnp.arange(4.)[None], mesh=mesh).tolist()
    [[1.0, 0.0, 3.0, 2.0]]
    """
    for x in xs:
        check_batch(x, mesh)
        require(
            x.shape[-1] % mesh.nodes == 0,
            f"`channels of the input` (={x.shape[-1]}) must be divisible by `nodes` "
            f"(={mesh.nodes}); give the layer before a multiple of {mesh.nodes}, or pad its output",
        )
    if mesh.nodes == 1:
        return fn(*xs)
    if mesh.distributed:
        out = jax.eval_shape(fn, *(_block(x, mesh.nodes) for x in xs))
        return jax.shard_map(
            fn,
            mesh=mesh.jax_mesh,
            in_specs=tuple(activation_spec(x.ndim, mesh) for x in xs),  # [b/data, ..., c/n]
            out_specs=activation_spec(out.ndim, mesh),  # [b/data, ..., c2/n]
        )(*xs)
    blocks = (jnp.reshape(x, (*x.shape[:-1], mesh.nodes, -1)) for x in xs)
    ys = jax.vmap(fn, in_axes=-2, out_axes=-2)(*blocks)
    return jnp.reshape(ys, (*ys.shape[:-2], -1))


def _block(x: Array, nodes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] // nodes), x.dtype)
