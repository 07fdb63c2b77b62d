"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545).

A block's depthwise convolution stays with the owner of each channel and moves nothing; its two
dense layers read an exchange each. LayerNorms exchange their statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.exchange import Replicated
from disco_jax.gather import Gather
from disco_jax.layers import Conv, Dense, LayerNorm, LayerScale, StochasticDepth, global_avg_pool
from disco_jax.mesh import NodeMesh

Layer = Callable[..., Any]


class Block(nnx.Module):
    """``x + scale(dense2(gelu(dense1(norm(depthwise(x))))))``."""

    def __init__(
        self, width: int, *, conv: Layer, dense: Layer, norm: Layer, ends: Sequence[Layer]
    ):
        self.depthwise = conv(width, width, (7, 7), feature_group_count=width)
        self.norm = norm(width)
        self.dense1 = dense(width, 4 * width)
        self.dense2 = dense(4 * width, width)
        self.ends = nnx.List(end(width) for end in ends)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = self.norm(self.depthwise(x))
        y = self.dense2(nnx.gelu(self.dense1(y), approximate=False))
        for end in self.ends:
            y = end(y)
        return x + y


class Stage(nnx.Module):
    """Halves the size, but for the first stage, and goes through its blocks."""

    def __init__(
        self,
        c_in: int,
        width: int,
        blocks: Sequence[Layer],
        *,
        halves: bool,
        conv: Layer,
        norm: Layer,
    ):
        self.norm = norm(c_in) if halves else None
        self.conv = conv(c_in, width, (2, 2), (2, 2), padding="VALID") if halves else None
        self.blocks = nnx.List(block(width) for block in blocks)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        if self.conv is not None and self.norm is not None:
            x = self.conv(self.norm(x))
        for block in self.blocks:
            x = block(x)
        return x


class ConvNeXt(nnx.Module):
    """Images ``[b, h, w, channels]`` to logits ``[b, num_classes]``.

    Args:
      depths, widths: blocks and channels of the stages.
      num_classes: size of the logits.
      norm_scope: over which channels a LayerNorm goes, ``"all"`` or those of a ``"node"``.
      layer_scale: what the branches' learned factors start from; None for none.
      drop_path: rate at which the last block's branch is dropped in training; it grows from 0.
      epsilon: of the LayerNorms.
      in_channels: channels of the images, which every node holds.
      dtype, param_dtype: computed in, and stored in.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 1000,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        norm_scope: Literal["all", "node"] = "all",
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.0,
        epsilon: float = 1e-6,
        in_channels: int = 3,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        weights = {"kernel_init": nnx.initializers.truncated_normal(0.02), "pad": True, **common}
        conv: Layer = partial(Conv, mesh=mesh, **weights)
        dense: Layer = partial(Dense, mesh=mesh, **weights)
        norm: Layer = partial(
            LayerNorm, mesh=mesh, scope=norm_scope, epsilon=epsilon, pad=True, **common
        )
        add: dict[str, Any] = {"mesh": mesh, "pad": True, "param_dtype": param_dtype}
        scales: list[Layer] = []
        if layer_scale is not None:
            scales.append(partial(LayerScale, init=layer_scale, **add))

        def block(index: int) -> Layer:
            rate = drop_path * index / max(1, sum(depths) - 1)

            def drop(width: int) -> StochasticDepth:
                return StochasticDepth(rate, ndim=4, rngs=rngs)

            ends = [*scales, *([drop] if rate else [])]
            return partial(Block, conv=conv, dense=dense, norm=norm, ends=ends)

        images = Replicated(in_channels, mesh=mesh)
        self.stem = Conv(
            in_channels, widths[0], (4, 4), (4, 4), padding="VALID", exchange=images, **weights
        )
        self.stem_norm = norm(widths[0])
        self.stages: nnx.List = nnx.List()
        first = 0
        for c_in, width, depth in zip((widths[0], *widths), widths, depths, strict=False):
            blocks = [block(i) for i in range(first, first + depth)]
            halves = len(self.stages) > 0
            self.stages.append(Stage(c_in, width, blocks, halves=halves, conv=conv, norm=norm))
            first += depth
        self.norm = norm(widths[-1])
        self.head = dense(widths[-1], num_classes)
        self.logits = Gather(num_classes, mesh=mesh)

    def __call__(self, images: Float[Array, "b h w channels"]) -> Float[Array, "b num_classes"]:
        x = self.stem_norm(self.stem(images))
        for stage in self.stages:
            x = stage(x)
        return self.logits(self.head(self.norm(global_avg_pool(x))))
