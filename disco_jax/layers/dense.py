"""Dense layers split over nodes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.bands import Window
from disco_jax.exchange import Reader
from disco_jax.layers.weights import apply_weights, distribute_weights, reader, refuse
from disco_jax.mesh import NodeMesh
from disco_jax.readable import Operation, Readable


class Dense(nnx.Linear):
    """``flax.nnx.Linear`` whose output features are shared by the nodes.

    Takes owned features ``[b, ..., c_in]`` or the :class:`Readable` of a shared exchange; returns
    owned features ``[b, ..., c_out]``. The kernel is Flax's ``[c_in, c_out]``, dead features at
    the end.

    Args:
      in_features, out_features: as in ``flax.nnx.Linear``, as are the other keywords.
      mesh: the nodes.
      exchange: a shared exchange to read instead of one of the layer's own.
      pad: append dead features where they do not divide by the nodes.
      unit: output features that stay together on a node, such as an attention head.

    Raises:
      DiscoError: if features do not divide by the nodes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        mesh: NodeMesh | None = None,
        exchange: Reader | None = None,
        pad: bool = False,
        unit: int = 1,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        refuse("Linear", kwargs, "dot_general", "promote_dtype", "preferred_element_type")
        alone = exchange is None
        exchange = reader(in_features, exchange=exchange, mesh=mesh, pad=pad)
        channels = exchange.outputs(out_features, pad=pad, unit=unit)
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        self.exchange = exchange
        self.mesh = exchange.mesh
        distribute_weights(self, exchange.channels, channels, alone=alone)

    def __call__(  # type: ignore[override]
        self, inputs: Float[Array, "b ... c_in"] | Readable
    ) -> Float[Array, "b ... c_out"]:
        return apply_weights(self, inputs, Operation(self._multiply, self.rows))

    def rows(self, height: int) -> Window:
        """What it reads along the rows of a map: pixel by pixel."""
        return Window()

    def _multiply(
        self, x: Float[Array, "b ... r"], kernel: Float[Array, "r o"]
    ) -> Float[Array, "b ... o"]:
        return jnp.matmul(x, kernel, precision=self.precision)
