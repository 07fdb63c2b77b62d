"""Normalisation: per channel, per group of channels, or over the channels of all nodes."""

from __future__ import annotations

from typing import Any, Literal

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.gather import Statistics
from disco_jax.layers.weights import refuse, split_channels
from disco_jax.mesh import NodeMesh
from disco_jax.partition import padded, per_node


def _split_scale_and_bias(norm: Any, channels: int) -> None:
    for parameter in (norm.scale, norm.bias):
        if parameter is not None:
            parameter.set_value(split_channels(parameter[...], channels, norm.mesh))


def _wide(x: Array) -> Array:
    """Moments are taken in float32 at least, as Flax does."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _scale_and_shift(norm: Any, x: Array, y: Array) -> Array:
    """Scales and shifts the normalised ``y``; the result has the dtype that Flax gives ``x``."""
    scale = None if norm.scale is None else norm.scale[...]
    bias = None if norm.bias is None else norm.bias[...]
    x, *_ = promote_dtype((x, scale, bias), dtype=norm.dtype)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).astype(x.dtype)


class BatchNorm(nnx.BatchNorm):
    """``flax.nnx.BatchNorm``: statistics are per channel, so they stay with their owner.

    Args as there, plus ``mesh`` and ``pad`` (dead channels for features that do not divide).
    """

    def __init__(
        self,
        num_features: int,
        *,
        mesh: NodeMesh,
        pad: bool = False,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        channels = padded(num_features, mesh.nodes, pad=pad, name="num_features")
        super().__init__(num_features, rngs=rngs, **kwargs)
        self.mesh = mesh
        self.num_features = channels
        _split_scale_and_bias(self, channels)
        # Dead channels have mean and variance 0 from the first step on.
        dtype = jnp.promote_types(self.param_dtype, jnp.float32)
        for statistic in (self.mean, self.var):
            statistic.set_value(split_channels(statistic[...].astype(dtype), channels, mesh))


class GroupNorm(nnx.Module):
    """``flax.nnx.GroupNorm`` with whole groups on each node: nothing moves.

    Raises:
      DiscoError: if the groups do not divide by the nodes, or the features by the groups.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        *,
        mesh: NodeMesh,
        epsilon: float = 1e-6,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
        use_bias: bool = True,
        use_scale: bool = True,
        rngs: nnx.Rngs,
    ):
        require(
            num_groups >= 1 and num_groups % mesh.nodes == 0 and num_features % num_groups == 0,
            f"`num_groups` (={num_groups}) must be divisible by `nodes` (={mesh.nodes}) and divide "
            f"`num_features` (={num_features}); choose another number of groups",
        )
        flat = nnx.GroupNorm(
            num_features,
            num_groups,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            rngs=rngs,
        )
        self.scale, self.bias = flat.scale, flat.bias
        self.mesh, self.num_groups, self.epsilon, self.dtype = mesh, num_groups, epsilon, dtype
        _split_scale_and_bias(self, num_features)

    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        return _scale_and_shift(self, x, per_node(self._normalise, _wide(x), mesh=self.mesh))

    def _normalise(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        groups = self.num_groups // self.mesh.nodes
        grouped = jnp.reshape(x, (*x.shape[:-1], groups, -1))
        axes = (*range(1, x.ndim - 1), x.ndim)
        mean = grouped.mean(axes, keepdims=True)
        variance = grouped.var(axes, keepdims=True)
        return jnp.reshape((grouped - mean) * lax.rsqrt(variance + self.epsilon), x.shape)


class LayerNorm(nnx.LayerNorm):
    """``flax.nnx.LayerNorm`` over channels that several nodes own.

    Args:
      scope: ``"all"`` normalises over all channels, as Flax does: the nodes exchange two numbers
        per token, which the plan counts. ``"node"`` normalises each node's own channels and moves
        nothing; it is another function, so train with it.
    """

    def __init__(
        self,
        num_features: int,
        *,
        mesh: NodeMesh,
        scope: Literal["all", "node"] = "all",
        pad: bool = False,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        require(
            scope in ("all", "node"),
            f"`scope` (={scope!r}) must be 'all' (statistics of all nodes, exchanged) or 'node' "
            "(each node's own)",
        )
        refuse("LayerNorm", kwargs, "reduction_axes", "feature_axes", "axis_name", "promote_dtype")
        require(
            scope == "all" or num_features % mesh.nodes == 0,
            f"`num_features` (={num_features}) must be divisible by `nodes` (={mesh.nodes}) with "
            "scope='node'; choose another number of features, or scope='all'",
        )
        channels = padded(num_features, mesh.nodes, pad=pad, name="num_features")
        super().__init__(num_features, rngs=rngs, **kwargs)
        self.mesh = mesh
        self.statistics = Statistics(num_features, mesh=mesh) if scope == "all" else None
        _split_scale_and_bias(self, channels)

    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:  # type: ignore[override]
        wide = _wide(x)
        if self.statistics is None:
            return _scale_and_shift(self, x, per_node(self._normalise, wide, mesh=self.mesh))
        mean, variance = self.statistics(wide)
        y = (wide - mean) * lax.rsqrt(variance + self.epsilon)
        if self.statistics.features < x.shape[-1]:  # dead channels stay 0
            y *= jnp.arange(x.shape[-1]) < self.statistics.features
        return _scale_and_shift(self, x, y)

    def _normalise(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + self.epsilon)


class L2Norm(nnx.Module):
    """Every position's channels divided by their Euclidean norm, times a factor for each channel.

    ``scale · x / max(‖x‖₂, ε)`` (Liu et al. 2015, arXiv 1506.04579), as SSD has it on its first
    map. The norm is over the channels of all nodes, which exchange two numbers per position.

    Args:
      num_features: channels.
      initial: what the factors start from.
      epsilon: the least norm that is divided by.
      mesh, pad: as in :class:`BatchNorm`.
      param_dtype: the factors are stored in.
    """

    def __init__(
        self,
        num_features: int,
        *,
        mesh: NodeMesh,
        pad: bool = False,
        initial: float = 20.0,
        epsilon: float = 1e-12,
        param_dtype: jax.typing.DTypeLike = "float32",
    ):
        channels = padded(num_features, mesh.nodes, pad=pad, name="num_features")
        self.mesh, self.epsilon = mesh, epsilon
        self.statistics = Statistics(num_features, mesh=mesh)
        start = jnp.full(num_features, initial, param_dtype)
        self.scale = nnx.Param(split_channels(start, channels, mesh))

    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        mean, variance = self.statistics(_wide(x))
        energy = self.statistics.features * (variance + jnp.square(mean))
        norm = jnp.sqrt(jnp.maximum(energy, self.epsilon**2))  # whose gradient at 0 is finite
        return (_wide(x) / norm * self.scale[...]).astype(x.dtype)
