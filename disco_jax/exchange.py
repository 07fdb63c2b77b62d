"""Exchanges: the operations that turn owned channels into readable channels.

A distributed layer = exchange ∘ local operation. Nothing else moves data between nodes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from disco_jax import wire
from disco_jax.errors import require
from disco_jax.mesh import NODE, NodeMesh
from disco_jax.partition import activation_spec, batch_spec, check_batch, owned, padded
from disco_jax.readable import Readable, note


class Mask(nnx.Variable):
    """``bool[node, channel]``: which node reads which channel. Own channels are always True."""


class Scale(nnx.Variable):
    """``float32[2, ...]``: lowest value, and step between two codes, of channels on the wire."""


class Reader(nnx.Module):
    """What a layer asks for its input; the subclasses say which channels a node may read.

    Args:
      features: number of channels of the input, before padding.
      mesh: the nodes.
      pad: append dead channels where ``features`` does not divide by the nodes.
      unit: channels that stay together on a node, such as an attention head.

    Attributes:
      channels: number of channels of the input, dead ones included.
      split_axis: of a kernel that reads it, the axis whose entries the nodes share; None where all
        of them hold all of it.
      name: the path within a model, once ``trace.name_exchanges`` has given one.
    """

    split_axis: int | None = -1  # output channels
    repeats = False  # whether every node computes all outputs

    def __init__(self, features: int, *, mesh: NodeMesh, pad: bool = False, unit: int = 1):
        self.features = features
        self.mesh = mesh
        self.unit = unit
        self.channels = padded(features, mesh.nodes, pad=pad, unit=unit)
        self.name: str | None = None

    def __call__(self, x: Float[Array, "b ... c"]) -> Readable:
        raise NotImplementedError

    def outputs(self, features: int, *, pad: bool, unit: int = 1) -> int:
        """Channels, dead ones included, of a layer of ``features`` outputs that reads this."""
        return padded(features, self.mesh.nodes, pad=pad, unit=unit, name="out_features")

    def _check(self, x: Array) -> None:
        require(
            x.shape[-1] == self.channels,
            f"`input channels` (={x.shape[-1]}) must be {self.channels} to be read by "
            f"{type(self).__name__}(features={self.features}, nodes={self.mesh.nodes}); give the "
            "layer the number of channels that its input has, or pad the input with "
            "partition.pad_channels",
        )
        check_batch(x, self.mesh)


class Replicated(Reader):
    """Every node already holds the whole input (the images): nothing moves."""

    def __init__(self, features: int, *, mesh: NodeMesh):
        super().__init__(features, mesh=mesh, pad=True)
        self.channels = features

    def __call__(self, x: Float[Array, "b ... c"]) -> Readable:
        self._check(x)
        return Readable(x, self.mesh, split=False, source=id(self))


class Exact(Reader):
    """What a layer reads that is split by rows, or computed by every node: all of it, no mask.

    In training, where a layer is the plain one; ``freeze`` puts in its place what brings a node
    the rows that it reads.

    Args:
      like: what the layer read before.
      target: ``"rows"`` or ``"replicated"``, what the layer's output is split along.

    Attributes:
      own: whether the layer is depthwise or grouped, and needs no more than own channels.
      whole: whether its outputs need not divide by the nodes, so that each computes all of them.
    """

    def __init__(self, like: Reader, target: str):
        super().__init__(like.features, mesh=like.mesh, pad=True, unit=like.unit)
        self.channels, self.name, self.target = like.channels, like.name, target
        self.own, self.whole = isinstance(like, Local), isinstance(like, Parts)

    def __call__(self, x: Float[Array, "b ... c"]) -> Readable:
        self._check(x)
        if self.mesh.distributed and not self.own:
            whole = self.mesh.sharding(*batch_spec(x.ndim, self.mesh))
            x = lax.with_sharding_constraint(x, whole)
        return Readable(x, self.mesh, split=self.own, repeated=self.whole, source=id(self))


class Local(Reader):
    """A node reads only its own channels (depthwise and grouped layers): nothing moves."""

    def __call__(self, x: Float[Array, "b ... c"]) -> Readable:
        self._check(x)
        return Readable(x, self.mesh, source=id(self))


class Parts(Reader):
    """A node reads only its own channels, for its part of every output: nothing moves.

    The kernel is shared by its input channels (row parallelism: Shoeybi et al. 2019, arXiv
    1909.08053), and the layer returns ``[b, ..., n*c_out]``, the parts beside each other, which
    :class:`disco_jax.gather.Sum` adds up. Where a layer has fewer outputs than inputs, such as the
    last one, less moves than through an exchange of its input, and nothing is left out.
    """

    split_axis = -2  # input channels

    def __call__(self, x: Float[Array, "b ... c"]) -> Readable:
        self._check(x)
        return Readable(x, self.mesh, packed=self.mesh.nodes > 1, source=id(self))

    def outputs(self, features: int, *, pad: bool, unit: int = 1) -> int:
        """Every node computes its part of each."""
        return features


class Exchange(Reader):
    """Masked exchange (training): all channels are gathered, a node reads those of its mask row.

    On real devices an ``all_gather`` over the node axis, emulated nothing. The kernels that read
    the result are multiplied by the mask.

    Attributes:
      mask: ``bool[node, channel]``.
      gate: a module ``mask -> float[node, channel]`` while gates are learned, else None.
      dense_gradient: whether weights behind a False of the mask get the gradient that they would
        have if they were read, so that a dropped pair can return.
      wire_dtype: what remote channels are rounded to, as on the wire; None rounds nothing.
      scale: ``float32[2, channel]`` where the wire dtype needs one.
      from_rows: whether the map is split by rows, so that own channels arrive as others do.
    """

    def __init__(self, features: int, *, mesh: NodeMesh, pad: bool = False, unit: int = 1):
        super().__init__(features, mesh=mesh, pad=pad, unit=unit)
        self.from_rows = False
        self.mask = Mask(mesh.put(self.full_mask()))
        self.gate: nnx.Module | None = nnx.data(None)
        self.dense_gradient = False
        self.wire_dtype: str | None = None
        self.scale: Scale | None = nnx.data(None)

    def full_mask(self) -> Bool[np.ndarray, "n c"]:
        """Everything but dead channels is read: the dense split."""
        alive = np.arange(self.channels) < self.features
        return owned(self.channels, self.mesh.nodes) | alive

    def set_mask(self, mask: Bool[Array, "n c"]) -> None:
        """Replaces the mask; own channels stay readable, dead ones are never sent.

        Raises:
          DiscoError: if the shape is not ``[nodes, channels]`` or the entries are not boolean.
        """
        shape = (self.mesh.nodes, self.channels)
        where = f" of exchange {self.name!r}" if self.name else ""
        require(
            jnp.shape(mask) == shape,
            f"`mask`{where} has shape {jnp.shape(mask)}, but must be [nodes, channels] = "
            f"{list(shape)}: row d, column c is True when node d reads channel c",
        )
        require(
            jnp.asarray(mask).dtype == jnp.bool_,
            f"`mask`{where} has dtype {jnp.asarray(mask).dtype}, but must be bool; "
            "pass mask.astype(bool)",
        )
        own = owned(self.channels, self.mesh.nodes)
        self.mask.set_value(jnp.asarray(mask) & self.full_mask() | own)

    def round_to(self, wire_dtype: str, scale: Float[np.ndarray, "2 c"] | None) -> None:
        """From now on remote channels are read as they arrive in ``wire_dtype``."""
        self.wire_dtype = wire.check_wire_dtype(wire_dtype)
        self.scale = None if scale is None else Scale(self.mesh.put(scale))

    def __call__(self, x: Float[Array, "b ... c"]) -> Readable:
        self._check(x)
        note(self, x)
        if self.mesh.nodes == 1:
            return Readable(x, self.mesh, source=id(self))
        gate = self.gate(self.mask[...]) if self.gate else self.mask[...]
        return Readable(
            self._gather(x) if self.mesh.distributed else self._versions(x, self._scale),
            self.mesh,
            gate=self._of_versions(gate),
            split=self.mesh.distributed,
            reach=self._of_versions(jnp.ones_like(self.mask[...])) if self.dense_gradient else None,
            source=id(self),
        )

    def _gather(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... n*r"]:
        spec = activation_spec(x.ndim, self.mesh)
        return jax.shard_map(
            lambda x, scale: self._versions(
                lax.all_gather(x, NODE, axis=x.ndim - 1, tiled=True), scale
            ),
            mesh=self.mesh.jax_mesh,
            in_specs=(spec, P()),  # [b/data, ..., c/n], [2, c]
            out_specs=spec,  # [b/data, ..., r]
        )(x, self._scale)

    def _versions(self, x: Float[Array, "b ... c"], scale: Array | None) -> Float[Array, "b ... r"]:
        """All channels, and where the wire rounds, all of them once more as they arrive."""
        if self.wire_dtype is None:
            return x
        return jnp.concatenate([x, wire.rounded(x, self.wire_dtype, scale)], -1)

    def _of_versions(self, gate: Array) -> Array:
        """Own channels are read as they were computed, remote ones as they arrive."""
        if self.wire_dtype is None:
            return gate
        own = owned(self.channels, self.mesh.nodes) & (not self.from_rows)
        return jnp.concatenate([gate * own, gate * ~own], -1)

    @property
    def _scale(self) -> Array | None:
        return None if self.scale is None else self.scale[...]
