"""Operations that keep every channel on its node although they touch the channel axis.

A plain ``concatenate`` would move ownership (the first tensor's channels would land on the first
nodes); these work within each node, so the channels of the result are ordered node by node.
Pooling is per channel and ordinary; it is here so that models need one import.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.mesh import NodeMesh
from disco_jax.partition import per_node

max_pool = linen.max_pool
avg_pool = linen.avg_pool


def global_avg_pool(x: Float[Array, "b *s c"]) -> Float[Array, "b c"]:
    """Mean over all spatial axes."""
    return x.mean(tuple(range(1, x.ndim - 1)))


def concat(xs: Sequence[Float[Array, "b ... _"]], *, mesh: NodeMesh) -> Float[Array, "b ... c"]:
    """Concatenates each node's own channels of all ``xs``."""
    return per_node(lambda *blocks: jnp.concatenate(blocks, -1), *xs, mesh=mesh)


def split(
    x: Float[Array, "b ... c"], sections: int, *, mesh: NodeMesh
) -> list[Float[Array, "b ... d"]]:
    """Splits each node's own channels into equal ``sections``: the inverse of :func:`concat`."""
    block = x.shape[-1] // mesh.nodes
    require(
        x.shape[-1] % (mesh.nodes * sections) == 0,
        f"`sections` (={sections}) must divide each node's channels (={block}, of {x.shape[-1]} on "
        f"{mesh.nodes} nodes); choose another number of sections",
    )
    size = block // sections
    return [
        per_node(lambda b, start=i * size: b[..., start : start + size], x, mesh=mesh)
        for i in range(sections)
    ]


def flatten(x: Float[Array, "b ..."], *, mesh: NodeMesh) -> Float[Array, "b f"]:
    """``[b, *s, c] -> [b, n * (s1*s2*... * c/n)]``: node by node, within a node as NumPy does."""
    return per_node(lambda block: jnp.reshape(block, (block.shape[0], -1)), x, mesh=mesh)


def pixel_shuffle(
    x: Float[Array, "b h w c"], scale: int, *, mesh: NodeMesh
) -> Float[Array, "b h*scale w*scale c/scale**2"]:
    """Depth to space on each node's own channels (Shi et al. 2016).

    Channels are ordered ``(feature, row, column)`` as in torch, so that whole features lie on a
    node and the result does not depend on the number of nodes: give the layer before
    ``unit=scale**2``.
    """
    block = x.shape[-1] // mesh.nodes
    require(
        block % scale**2 == 0,
        f"each node's channels (={block}, of {x.shape[-1]} on {mesh.nodes} nodes) must be "
        f"divisible by `scale`**2 (={scale**2}); give the layer before unit={scale**2}, or a "
        f"multiple of {mesh.nodes * scale**2} features",
    )
    return per_node(lambda x: depth_to_space(x, scale), x, mesh=mesh)


def depth_to_space(
    x: Float[Array, "b h w c"], scale: int
) -> Float[Array, "b h*scale w*scale c/scale**2"]:
    """Channels ``(feature, row, column)`` to features at as many times the height and width."""
    b, h, w, _ = x.shape
    x = jnp.reshape(x, (b, h, w, -1, scale, scale))
    return jnp.reshape(jnp.transpose(x, (0, 1, 4, 2, 5, 3)), (b, h * scale, w * scale, -1))


def resize(
    x: Float[Array, "b h w c"], size: Sequence[int], *, mesh: NodeMesh | None = None
) -> Float[Array, "b h2 w2 c"]:
    """Bilinear interpolation to ``size``, pixels as areas (torch: ``align_corners=False``).

    Args:
      x: owned channels with their ``mesh``, or channels that every node holds, without.
      size: height and width of the result.
      mesh: the nodes that own the channels.
    """

    def on_node(x: Array) -> Array:
        shape = (x.shape[0], *size, x.shape[-1])
        return jax.image.resize(x, shape, "bilinear", antialias=False)

    return on_node(x) if mesh is None else per_node(on_node, x, mesh=mesh)
