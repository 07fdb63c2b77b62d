"""Convolutions split over nodes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from disco_jax.bands import Window
from disco_jax.errors import require
from disco_jax.exchange import Reader
from disco_jax.layers.weights import apply_weights, distribute_weights, reader, refuse
from disco_jax.mesh import NodeMesh
from disco_jax.partition import pad_axis
from disco_jax.readable import Operation, Readable

Sizes = int | Sequence[int]
Padding = str | int | Sequence[int | tuple[int, int]]


class Conv(nnx.Conv):
    """``flax.nnx.Conv`` whose output channels are shared by the nodes.

    Takes owned channels ``[b, *spatial, c_in]``, or the :class:`Readable` of an exchange that
    several layers share, and returns owned channels ``[b, *spatial, c_out]``. The kernel has
    Flax's shape ``[*kernel_size, c_in / groups, c_out]``, dead channels at the end.

    Args:
      in_features, out_features, kernel_size, strides: as in ``flax.nnx.Conv``, as are the other
        keywords (``padding``, ``kernel_dilation``, ``feature_group_count``, ``use_bias``,
        ``dtype``, ...).
      mesh: the nodes.
      exchange: a shared exchange to read instead of one of the layer's own.
      pad: append dead channels where the features do not divide by the nodes.
      unit: output channels that stay together on a node, such as those of a pixel shuffle.

    With ``feature_group_count > 1`` every node keeps whole groups and nothing moves.

    Raises:
      DiscoError: if channels or groups do not divide by the nodes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sizes,
        strides: Sizes = 1,
        *,
        mesh: NodeMesh | None = None,
        exchange: Reader | None = None,
        pad: bool = False,
        unit: int = 1,
        feature_group_count: int = 1,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        ignored = ("mask", "conv_general_dilated", "promote_dtype", "preferred_element_type")
        refuse("Conv", kwargs, *ignored)
        alone = exchange is None
        exchange = reader(
            in_features, exchange=exchange, mesh=mesh, pad=pad, groups=feature_group_count
        )
        mesh = exchange.mesh
        channels = exchange.outputs(out_features, pad=pad, unit=unit)
        grouped = feature_group_count > 1
        # Dead channels are groups of their own where every channel is one.
        depthwise = pad and feature_group_count == in_features == out_features
        require(
            not grouped or depthwise or feature_group_count % mesh.nodes == 0,
            f"`feature_group_count` (={feature_group_count}) must be divisible by `nodes` "
            f"(={mesh.nodes}), so that each node keeps whole groups; use a multiple of "
            f"{mesh.nodes}, or feature_group_count=1",
        )
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides,
            feature_group_count=feature_group_count,
            rngs=rngs,
            **kwargs,
        )
        self.exchange = exchange
        self.mesh = mesh
        c_in = self.kernel.shape[-2] if grouped else exchange.channels
        distribute_weights(self, c_in, channels, alone=alone)

    def __call__(  # type: ignore[override]
        self, inputs: Float[Array, "b *s c_in"] | Readable
    ) -> Float[Array, "b *s c_out"]:
        of_rows = partial(self._convolve, padded_rows=True)
        return apply_weights(self, inputs, Operation(self._convolve, self.rows, of_rows))

    def _convolve(
        self,
        x: Float[Array, "b *s r"],
        kernel: Float[Array, "*k r_per_group o"],
        *,
        padded_rows: bool = False,
    ) -> Float[Array, "b *s o"]:
        """What one node computes; the number of its groups follows from the shapes."""
        rank = len(self.kernel_size)
        require(
            x.ndim == rank + 2,
            f"`inputs` of a Conv with kernel_size {self.kernel_size} must have {rank + 2} axes "
            f"[batch, *spatial, channels], not {x.ndim}; add a batch axis, or reshape",
        )
        dilation = _windows(self.kernel_dilation, rank)
        strides = _windows(self.strides, rank)
        x, padding = pad_input(x, self.padding, self.kernel_size, dilation)
        if padded_rows:
            around = sides(x.shape[1:-1], self.kernel_size, strides, padding, dilation)
            padding = [(0, 0), *around[1:]]
        if self._pointwise(padding) and x.shape[-1] == kernel.shape[-2]:
            every = (slice(None), *(slice(None, None, s) for s in strides))
            matrix = kernel.reshape(kernel.shape[-2:])
            return jnp.matmul(x[every], matrix, precision=self.precision)
        if x.shape[-1] == kernel.shape[-2] == 3 and kernel.shape[-1] < 48:
            # A node's share of a stem: XLA:CPU does three channels five times slower than four.
            x, kernel = pad_axis(x, 4, -1), pad_axis(kernel, 4, -2)
        spatial = "DHW"[-rank:]
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            lhs_dilation=_windows(self.input_dilation, rank),
            rhs_dilation=dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=x.shape[-1] // kernel.shape[-2],
            precision=self.precision,
        )

    def rows(self, height: int) -> Window:
        """What it reads along the first spatial axis.

        Raises:
          DiscoError: if the padding or a dilation of the input has no rows of zeros alone.
        """
        plain = not isinstance(self.padding, str) or self.padding.upper() in ("SAME", "VALID")
        rank = len(self.kernel_size)
        require(
            plain and self.input_dilation in (None, 1, (1,) * rank),
            f"`padding` (={self.padding!r}) with `input_dilation` (={self.input_dilation}) cannot "
            "be split by rows; split the layer by channels",
        )
        strides = _windows(self.strides, rank)
        dilation = _windows(self.kernel_dilation, rank)
        (low, high), *_ = sides((height,) * rank, self.kernel_size, strides, self.padding, dilation)
        return Window((self.kernel_size[0] - 1) * dilation[0] + 1, strides[0], low, high)

    def _pointwise(self, padding: str | list[tuple[int, int]]) -> bool:
        """Whether it is a product with a matrix, which CPUs do faster than a convolution."""
        alone = all(k == 1 for k in self.kernel_size)
        plain = isinstance(padding, str) or not any(low or high for low, high in padding)
        return alone and plain and self.input_dilation in (None, 1, (1,) * len(self.kernel_size))


def _windows(value: Sizes | None, rank: int) -> tuple[int, ...]:
    return (value or 1,) * rank if isinstance(value, int) or value is None else tuple(value)


def sides(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """Flax's padding as zeros before and after each axis of ``shape``."""
    dilation = dilation or [1] * len(kernel_size)
    _, around = pad_input(jnp.zeros(()), padding, kernel_size, dilation)
    if not isinstance(around, str):
        return around
    windows = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    return lax.padtype_to_pads(shape, windows, strides, around)


def pad_input(
    x: Array, padding: Padding, kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[Array, str | list[tuple[int, int]]]:
    """Flax's padding as XLA takes it; circular and reflected borders are written out.

    Raises:
      DiscoError: for a padding that Flax does not know.
    """
    if not isinstance(padding, str):
        sides = (padding,) * len(kernel_size) if isinstance(padding, int) else padding
        return x, [(p, p) if isinstance(p, int) else (p[0], p[1]) for p in sides]
    if padding.upper() in ("SAME", "VALID"):
        return x, padding.upper()
    reach = [(k - 1) * d for k, d in zip(kernel_size, dilation, strict=True)]
    borders = {
        "CIRCULAR": ("wrap", [(r // 2, (r + 1) // 2) for r in reach]),
        "REFLECT": ("reflect", [(r // 2, (r + 1) // 2) for r in reach]),
        "CAUSAL": ("constant", [(r, 0) for r in reach]),
    }
    require(
        padding in borders and (padding != "CAUSAL" or len(reach) == 1),
        f"`padding` (={padding!r}) must be 'SAME', 'VALID', 'CIRCULAR', 'REFLECT', 'CAUSAL' (one "
        "spatial axis only), an integer, or a sequence of integers or (low, high) pairs",
    )
    mode, sides = borders[padding]
    return jnp.pad(x, [(0, 0), *sides, (0, 0)], mode=mode), "VALID"
