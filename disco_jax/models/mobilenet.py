"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381).

A block's depthwise convolution stays with the owner of each channel and moves nothing; its two 1x1
convolutions read an exchange each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.exchange import Replicated
from disco_jax.gather import Gather
from disco_jax.layers import BatchNorm, Conv, Dense, GlobalPool
from disco_jax.mesh import NodeMesh

Layer = Callable[..., Any]
STAGES = (  # expansion, channels, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nnx.Module):
    """``x + project(relu6(depthwise(relu6(expand(x)))))``, the sum only where shapes agree."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, expansion: int, *, conv: Layer, norm: Layer
    ):
        width = expansion * c_in
        self.adds = stride == 1 and c_in == c_out
        self.expand = conv(c_in, width, (1, 1)) if expansion > 1 else None
        self.expand_norm = norm(width) if expansion > 1 else None
        window: dict[str, Any] = {"padding": 1, "feature_group_count": width}
        self.depthwise = conv(width, width, (3, 3), (stride, stride), **window)
        self.depthwise_norm = norm(width)
        self.project = conv(width, c_out, (1, 1))
        self.project_norm = norm(c_out)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = nnx.relu6(self.expand_norm(self.expand(y)))
        y = nnx.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.adds else y


class MobileNetV2(nnx.Module):
    """Images ``[b, h, w, channels]`` to logits ``[b, num_classes]``.

    Args:
      num_classes: size of the logits.
      width: factor of all numbers of channels; they become multiples of 8.
      stages: expansion, channels, blocks and stride of each.
      dropout: rate before the head, in training.
      in_channels: channels of the images, which every node holds.
      dtype, param_dtype: computed in, and stored in.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        width: float = 1.0,
        stages: Sequence[Sequence[int]] = STAGES,
        dropout: float = 0.2,
        in_channels: int = 3,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        add: dict[str, Any] = {"mesh": mesh, "pad": True, **dtypes, "rngs": rngs}
        he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        norm: Layer = partial(BatchNorm, momentum=0.9, **add)
        stem: Layer = partial(Conv, use_bias=False, kernel_init=he_normal, pad=True, **dtypes)
        conv: Layer = partial(stem, mesh=mesh, rngs=rngs)
        c_in, last = divisible(32 * width), divisible(1280 * max(1.0, width))
        images = Replicated(in_channels, mesh=mesh)
        self.stem = stem(in_channels, c_in, (3, 3), (2, 2), padding=1, exchange=images, rngs=rngs)
        self.stem_norm = norm(c_in)
        blocks = []
        for expansion, channels, depth, stride in stages:
            for i in range(depth):
                c_out, step = divisible(channels * width), stride if i == 0 else 1
                blocks.append(InvertedResidual(c_in, c_out, step, expansion, conv=conv, norm=norm))
                c_in = c_out
        self.blocks = nnx.List(blocks)
        self.last = conv(c_in, last, (1, 1))
        self.last_norm = norm(last)
        self.mean = GlobalPool(mesh=mesh)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = Dense(last, num_classes, **add)
        self.logits = Gather(num_classes, mesh=mesh)

    def __call__(self, images: Float[Array, "b h w channels"]) -> Float[Array, "b num_classes"]:
        x = nnx.relu6(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu6(self.last_norm(self.last(x)))
        return self.logits(self.head(self.dropout(self.mean(x))))


def divisible(channels: float, by: int = 8) -> int:
    """The closest multiple, but at least nine tenths.

    >>> divisible(24 * 0.35), divisible(24 * 0.75), divisible(17)
    (8, 24, 16)
    """
    closest = max(by, int(channels + by / 2) // by * by)
    return closest + by if closest < 0.9 * channels else closest
