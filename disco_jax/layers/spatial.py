"""Operations without weights along the spatial axes, as modules.

Per channel, so that by channels nothing moves; ``freeze`` tells one whose map is split by rows what
it reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from disco_jax.bands import Bands, Interpolation, Window
from disco_jax.gather import Sum
from disco_jax.layers.conv import Padding, sides
from disco_jax.layers.local import concat, depth_to_space, pixel_shuffle, resize
from disco_jax.mesh import NODE, NodeMesh
from disco_jax.partition import activation_spec, row_spec
from disco_jax.readable import Operation
from disco_jax.rows import RowReader


class MaxPool(nnx.Module):
    """The largest value of each window: ``[b, h, w, c] -> [b, h2, w2, c]``.

    Args:
      window, strides, padding: as in ``flax.nnx.max_pool``.
      mesh: the nodes.

    Attributes:
      exchange: of rows, where the map is split by them.
    """

    fill = -np.inf

    def __init__(
        self,
        window: Sequence[int],
        strides: Sequence[int] | None = None,
        padding: Padding = "VALID",
        *,
        mesh: NodeMesh,
    ):
        self.kernel_size, self.strides = tuple(window), tuple(strides or [1] * len(window))
        self.padding, self.mesh = padding, mesh
        self.exchange: RowReader | None = nnx.data(None)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        if self.exchange is None:
            return self._pool(x)
        op = Operation(lambda x, _: self._pool(x), self.rows, lambda x, _: self._pool(x, rows=True))
        return self.exchange(x).apply(op, None)

    def rows(self, height: int) -> Window:
        """What it reads along the rows."""
        (low, high), *_ = self._sides((height,) * len(self.kernel_size))
        return Window(self.kernel_size[0], self.strides[0], low, high)

    def _pool(self, x: Array, *, rows: bool = False) -> Array:
        around = self._sides(x.shape[1:-1])
        padding = [(0, 0), *around[1:]] if rows else around
        return linen.max_pool(x, self.kernel_size, self.strides, padding)

    def _sides(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        return sides(shape, self.kernel_size, self.strides, self.padding)


class GlobalPool(nnx.Module):
    """Mean over all positions: ``[b, h, w, c] -> [b, c]``, or ``[b, 1, 1, c]`` with ``keepdims``.

    Attributes:
      bands: where the map is split by rows, its rows.
      total: what adds up the nodes' parts then; every node holds the result.
    """

    def __init__(self, *, keepdims: bool = False, mesh: NodeMesh):
        self.keepdims, self.mesh = keepdims, mesh
        self.bands: Bands | None = None
        self.total: Sum | None = nnx.data(None)

    def split_by_rows(self, bands: Bands, channels: int) -> None:
        """From now on the maps are split by rows."""
        self.bands, self.total = bands, Sum(channels, mesh=self.mesh, for_rows=True)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b ... c"]:
        axes = tuple(range(1, x.ndim - 1))
        if self.bands is None or self.total is None:
            return x.mean(axes, keepdims=self.keepdims)
        share = self.bands.size / self.bands.height  # of all rows, those of a band
        alive = jnp.arange(x.shape[1]) < self.bands.height
        alive = alive.reshape(-1, *[1] * (x.ndim - 2))

        def on_node(x: Array, alive: Array) -> Array:
            return share * jnp.where(alive, x, 0).mean(axes, keepdims=self.keepdims)

        if not self.mesh.distributed:
            blocks = (jnp.split(a, self.mesh.nodes, axis) for a, axis in ((x, 1), (alive, 0)))
            parts = jnp.concatenate([on_node(*b) for b in zip(*blocks, strict=True)], -1)
            return self.total(parts)
        parts = jax.shard_map(
            on_node,
            mesh=self.mesh.jax_mesh,
            in_specs=(row_spec(x.ndim, self.mesh), P(NODE)),  # [b/data, band, w, c], [band, 1, 1]
            # [b/data, c], or [b/data, 1, 1, c]: the nodes' parts beside each other
            out_specs=activation_spec(x.ndim if self.keepdims else 2, self.mesh),
        )(x, alive)
        return self.total(parts)


class Resize(nnx.Module):
    """Bilinear interpolation, see :func:`disco_jax.layers.resize`.

    Attributes:
      exchange: of rows, where the map is split by them.
      height: rows of the result then, however many dead ones the ``size`` asked for counts.
    """

    def __init__(self, *, mesh: NodeMesh):
        self.mesh, self.height = mesh, 0
        self.exchange: RowReader | None = nnx.data(None)

    def __call__(
        self, x: Float[Array, "b h w c"], size: Sequence[int]
    ) -> Float[Array, "b h2 w2 c"]:
        if self.exchange is None:
            return resize(x, size, mesh=self.mesh)
        readable, window = self.exchange(x), Interpolation(self.height)

        def on_node(x: Array, weights: Array) -> Array:
            x = jnp.einsum("or,brwc->bowc", weights, x, precision="highest")
            return resize(x, (x.shape[1], size[1]))

        weights = window.weights(readable.height, len(readable.reads.first))
        op = Operation(on_node, lambda _: window)
        return readable.apply(op, jnp.asarray(weights, x.dtype), per_node=True)


class Concat(nnx.Module):
    """Concatenates each node's own channels, see :func:`disco_jax.layers.concat`.

    Attributes:
      by_rows: whether the maps are split by rows; their channels come in the same order.
    """

    def __init__(self, *, mesh: NodeMesh):
        self.mesh, self.groups, self.by_rows = mesh, mesh.nodes, False

    def __call__(self, xs: Sequence[Float[Array, "b ... _"]]) -> Float[Array, "b ... c"]:
        if not self.by_rows:
            return concat(xs, mesh=self.mesh)

        def on_node(*xs: Array) -> Array:
            groups = [jnp.reshape(x, (*x.shape[:-1], self.groups, -1)) for x in xs]
            return jnp.reshape(jnp.concatenate(groups, -1), (*xs[0].shape[:-1], -1))

        if not self.mesh.distributed:
            return on_node(*xs)
        specs = tuple(row_spec(x.ndim, self.mesh) for x in xs)  # [b/data, band, ..., _]
        return jax.shard_map(on_node, mesh=self.mesh.jax_mesh, in_specs=specs, out_specs=specs[0])(
            *xs
        )  # [b/data, band, ..., c]


class PixelShuffle(nnx.Module):
    """Depth to space, see :func:`disco_jax.layers.pixel_shuffle`.

    Attributes:
      by_rows: whether the maps are split by rows.
    """

    def __init__(self, scale: int, *, mesh: NodeMesh):
        self.scale, self.mesh, self.by_rows = scale, mesh, False

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h*scale w*scale c/scale**2"]:
        if not self.by_rows:
            return pixel_shuffle(x, self.scale, mesh=self.mesh)
        if not self.mesh.distributed:
            return depth_to_space(x, self.scale)
        spec = row_spec(x.ndim, self.mesh)
        return jax.shard_map(
            lambda x: depth_to_space(x, self.scale),
            mesh=self.mesh.jax_mesh,
            in_specs=spec,  # [b/data, band, w, c]
            out_specs=spec,  # [b/data, band*scale, w*scale, c/scale**2]
        )(x)
