"""Exchanges without a mask: results and statistics that every node needs."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from disco_jax import wire
from disco_jax.bands import Bands
from disco_jax.errors import require
from disco_jax.mesh import NODE, NodeMesh
from disco_jax.messages import permute, ring
from disco_jax.partition import activation_spec, batch_spec, padded, row_spec
from disco_jax.readable import note


class AllGather(nnx.Module):
    """An exchange without a mask: every node sends ``width`` numbers per position to all others.

    Subclasses say which; both lives, masked and packed, use it as it is.

    Attributes:
      bands: where what is gathered is split by rows, its rows.
    """

    def __init__(self, width: int, *, mesh: NodeMesh):
        self.width = width
        self.mesh = mesh
        self.name: str | None = None
        self.bands: Bands | None = None

    def unit_size(self, shape: tuple[int, ...], positions: int) -> int:
        """At how many positions a node has numbers, of a map of this shape."""
        return positions if self.bands is None else self.bands.size * math.prod(shape[2:-1])

    def gathered(self, shape: tuple[int, ...]) -> int:
        """How many numbers it gives to all others at each of them: all channels of its rows."""
        return self.width if self.bands is None else shape[-1]

    def _all_rows(
        self, x: Float[Array, "b rows ... c"], bands: Bands, wire_dtype: str | None
    ) -> Float[Array, "b h ... c"]:
        if self.mesh.nodes > 1:
            note(self, x)
            x = everywhere(x, self.mesh, wire_dtype, axis=1)
        return x[:, : bands.height]


class Gather(AllGather):
    """Gives every node all channels, dead ones dropped: ``[b, ..., padded] -> [b, ..., c]``.

    The way out for a result whose channels do not divide by the nodes; where they do, the result
    stays where it was computed and nothing moves, unless ``always`` says that what follows mixes
    channels and needs them all. In ``wire_dtype`` (``"float16"`` or ``"bfloat16"``) everybody reads
    it as it arrives, its owner too; None moves it as it is.
    """

    def __init__(
        self,
        features: int,
        *,
        mesh: NodeMesh,
        always: bool = False,
        wire_dtype: str | None = None,
    ):
        self.features, self.always = features, always
        self.wire_dtype = floating(wire_dtype)
        super().__init__(padded(features, mesh.nodes, pad=True) // mesh.nodes, mesh=mesh)

    def __call__(self, x: Float[Array, "b ... padded"]) -> Float[Array, "b ... c"]:
        if self.bands is not None:
            stays = x.shape[1] == self.bands.height and not self.always
            y = x if stays else self._all_rows(x, self.bands, self.wire_dtype)
            return y[..., : self.features]
        whole = x.shape[-1] == self.features
        if self.mesh.nodes == 1 or (whole and not self.always):
            return x
        note(self, x)
        found = everywhere(x, self.mesh, self.wire_dtype)
        return found[..., : self.features]


class Sum(AllGather):
    """Gives every node the sum of what the nodes computed: ``[b, ..., n*c] -> [b, ..., c]``.

    The way out for a layer that reads :class:`disco_jax.exchange.Parts`. In ``wire_dtype`` each
    part is read as it arrives, by its owner too; the sum is what is computed in. Where that layer
    is split by rows, there are no parts but rows. ``for_rows``: no split by channels would need it.
    """

    def __init__(
        self,
        features: int,
        *,
        mesh: NodeMesh,
        wire_dtype: str | None = None,
        for_rows: bool = False,
    ):
        self.features, self.wire_dtype = features, floating(wire_dtype)
        self.for_rows = for_rows
        super().__init__(features, mesh=mesh)

    def __call__(self, x: Float[Array, "b ... parts"]) -> Float[Array, "b ... c"]:
        if self.bands is not None:
            return self._all_rows(x, self.bands, self.wire_dtype)
        if self.mesh.nodes == 1 or x.shape[-1] == self.features:
            return x
        note(self, x)
        x = everywhere(x, self.mesh, self.wire_dtype)
        return jnp.reshape(x, (*x.shape[:-1], self.mesh.nodes, self.features)).sum(-2)


class Everywhere(AllGather):
    """Gives every node all channels, dead ones included: ``[b, ..., n*width]``, as it is."""

    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        if self.mesh.nodes > 1:
            note(self, x)
        return everywhere(x, self.mesh)


class Statistics(AllGather):
    """Mean and variance over the channels of all nodes: two numbers per position travel.

    Each node sends its mean and sum of squared deviations; they are merged by Chan's formula
    (Chan, Golub & LeVeque 1979), which does not cancel as E[x²] - E[x]² does.
    """

    def __init__(self, features: int, *, mesh: NodeMesh):
        self.features = features
        super().__init__(2, mesh=mesh)

    def __call__(
        self, x: Float[Array, "b ... c"]
    ) -> tuple[Float[Array, "b ... 1"], Float[Array, "b ... 1"]]:
        """Returns mean and variance in float32 at least; dead channels do not count."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.mesh.nodes == 1:
            return x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        note(self, x)
        block = x.shape[-1] // self.mesh.nodes
        starts = np.arange(self.mesh.nodes) * block
        counts = np.clip(self.features - starts, 0, block).astype(x.dtype)
        if not self.mesh.distributed:
            blocks = jnp.reshape(x, (*x.shape[:-1], self.mesh.nodes, block))
            return _merge(jax.vmap(_moments, (-2, 0), -2)(blocks, counts), counts)
        spec = activation_spec(x.ndim, self.mesh)
        gather = partial(_all_gather, dtype=str(x.dtype))
        return jax.shard_map(
            lambda x, count: _merge(jnp.moveaxis(gather(_moments(x, count[0])), 0, -2), counts),
            mesh=self.mesh.jax_mesh,
            in_specs=(spec, P(NODE)),  # [b/data, ..., c/n], [1]
            out_specs=P(*spec[:-1]),  # [b/data, ..., 1] twice, the same on every node
            check_vma=False,
        )(x, counts)


def everywhere(
    x: Float[Array, "b ... c"],
    mesh: NodeMesh,
    wire_dtype: str | None = None,
    *,
    axis: int = -1,
) -> Float[Array, "b ... c"]:
    """Gives every node the channels of all, or along ``axis`` 1 the rows, as they arrive.

    The gradient passes through the rounding as if there were none.
    """
    dtype = wire_dtype or str(x.dtype)
    if not mesh.distributed:
        return x if dtype == x.dtype else wire.rounded(x, dtype, None)
    return jax.shard_map(
        lambda x: jnp.concatenate([*_all_gather(x, dtype)], axis),
        mesh=mesh.jax_mesh,
        # [b/data, ..., c/n] or [b/data, band, ...]
        in_specs=(activation_spec if axis == -1 else row_spec)(x.ndim, mesh),
        out_specs=batch_spec(x.ndim, mesh),  # [b/data, ..., c], the same on every node
        check_vma=False,  # which the checker cannot infer
    )(x)


def floating(wire_dtype: str | None) -> str | None:
    """Returns a wire dtype that needs no range, else raises a DiscoError."""
    require(
        wire_dtype is None or not wire.calibrated(wire.check_wire_dtype(wire_dtype)),
        f"`wire_dtype` (={wire_dtype!r}) of a result must be a floating dtype, for integers "
        "need a range; choose float16",
    )
    return wire_dtype


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _all_gather(x: Shaped[Array, "b ..."], dtype: str) -> Shaped[Array, "n ..."]:
    """What every node has, in as many bytes as the dtype says."""
    return wire.decode(_around(wire.encode(x, dtype)), dtype, x)


def _all_gather_bwd(dtype: str, _: None, gradient: Array) -> tuple[Array]:
    """The transpose of a gather that rounds nothing: bits have no gradient."""
    return jax.linear_transpose(_around, jax.typeof(gradient[0]))(gradient)


_all_gather.defvjp(lambda *args: (_all_gather(*args), None), _all_gather_bwd)


def _around(sent: Shaped[Array, "b ..."]) -> Shaped[Array, "n ..."]:
    """What every node sends, by one permute a ring offset.

    It is as fast as gloo's own all-gather, and counted like every other message.
    """
    n = lax.axis_size(NODE)
    found = jnp.stack([sent, *(permute(sent, ring(n, offset)) for offset in range(1, n))])
    source = (lax.axis_index(NODE) - jnp.arange(n)) % n  # offset k brings what node - k has
    return found[source]


def _moments(x: Array, count: Array | np.ndarray) -> Array:
    """``[..., c] -> [..., 2]``: mean and sum of squared deviations of the first ``count``."""
    alive = jnp.arange(x.shape[-1]) < count
    mean = jnp.sum(x * alive, -1, keepdims=True) / jnp.maximum(count, 1)
    return jnp.concatenate([mean, jnp.sum(alive * (x - mean) ** 2, -1, keepdims=True)], -1)


def _merge(moments: Array, counts: np.ndarray) -> tuple[Array, Array]:
    """``[..., n, 2] -> [..., 1]`` mean and variance of all nodes together."""
    total = counts.sum()
    mean = jnp.sum(moments[..., 0] * counts, -1, keepdims=True) / total
    between = jnp.sum(counts * (moments[..., 0] - mean) ** 2, -1, keepdims=True)
    return mean, (jnp.sum(moments[..., 1], -1, keepdims=True) + between) / total
