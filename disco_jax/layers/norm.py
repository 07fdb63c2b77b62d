"""Normalisation: per channel, per group of channels, or over the channels of all nodes."""

from __future__ import annotations

from typing import Any, Literal

from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.gather import Statistics
from disco_jax.layers.weights import split_channels
from disco_jax.mesh import NodeMesh
from disco_jax.partition import padded, per_node


def _split_scale_and_bias(norm: Any, channels: int) -> None:
    for parameter in (norm.scale, norm.bias):
        if parameter is not None:
            parameter.set_value(split_channels(parameter[...], channels, norm.mesh))


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
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        require(
            num_groups % mesh.nodes == 0 and num_features % num_groups == 0,
            f"`num_groups` (={num_groups}) must be divisible by `nodes` (={mesh.nodes}) and divide "
            f"`num_features` (={num_features}); choose another number of groups",
        )
        flat = nnx.GroupNorm(num_features, num_groups, epsilon=epsilon, rngs=rngs, **kwargs)
        self.scale, self.bias = flat.scale, flat.bias
        self.mesh, self.num_groups, self.epsilon = mesh, num_groups, epsilon
        _split_scale_and_bias(self, num_features)

    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        y = per_node(self._normalise, x, mesh=self.mesh)
        y = y if self.scale is None else y * self.scale[...]
        return y if self.bias is None else y + self.bias[...]

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
        channels = padded(num_features, mesh.nodes, pad=pad and scope == "all")
        super().__init__(num_features, rngs=rngs, **kwargs)
        self.mesh = mesh
        self.statistics = Statistics(num_features, mesh=mesh) if scope == "all" else None
        _split_scale_and_bias(self, channels)

    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:  # type: ignore[override]
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        x, scale, bias = promote_dtype((x, scale, bias), dtype=self.dtype)
        if self.statistics is None:
            y = per_node(self._normalise, x, mesh=self.mesh)
        else:
            mean, variance = self.statistics(x)
            y = (x - mean) * lax.rsqrt(variance + self.epsilon)
            if scale is None:  # keep dead channels dead; otherwise their scale of 0 does
                y = jnp.where(jnp.arange(x.shape[-1]) < self.statistics.features, y, 0)
        y = y if scale is None else y * scale
        return y if bias is None else y + bias

    def _normalise(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        mean = x.mean(-1, keepdims=True)
        return (x - mean) * lax.rsqrt(x.var(-1, keepdims=True) + self.epsilon)
