"""Super-resolution: EDSR (Lim et al. 2017, arXiv 1707.02921) and RCAN (Zhang et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.exchange import Parts, Replicated
from disco_jax.gather import Gather, Sum
from disco_jax.layers import Conv, GlobalPool, PixelShuffle
from disco_jax.mesh import NodeMesh

Layer = Callable[..., Any]
Map = Float[Array, "b h w c"]
SHUFFLES = {2: (2,), 3: (3,), 4: (2, 2)}  # of each scale


class ResidualBlock(nnx.Module):
    """``x + factor * conv(relu(conv(x)))``, without norms."""

    def __init__(self, width: int, *, factor: float, conv: Layer):
        self.conv1 = conv(width, width)
        self.conv2 = conv(width, width)
        self.factor = factor

    def __call__(self, x: Map) -> Map:
        return x + self.factor * self.conv2(nnx.relu(self.conv1(x)))


class AttentionBlock(nnx.Module):
    """RCAN's: what the block adds is weighted channel by channel by the mean of the whole image."""

    def __init__(self, width: int, *, reduction: int, conv: Layer):
        point: Layer = partial(conv, kernel_size=(1, 1))
        self.conv1 = conv(width, width)
        self.conv2 = conv(width, width)
        self.squeeze = point(width, width // reduction)
        self.excite = point(width // reduction, width)
        self.mean = GlobalPool(keepdims=True, mesh=self.conv1.mesh)

    def __call__(self, x: Map) -> Map:
        y = self.conv2(nnx.relu(self.conv1(x)))
        weights = self.excite(nnx.relu(self.squeeze(self.mean(y))))
        return x + y * nnx.sigmoid(weights)


class Group(nnx.Module):
    """``x + conv(blocks(x))``."""

    def __init__(self, width: int, blocks: Sequence[Callable[[Map], Map]], *, conv: Layer):
        self.blocks = nnx.List(blocks)
        self.conv = conv(width, width)

    def __call__(self, x: Map) -> Map:
        y = x
        for block in self.blocks:
            y = block(y)
        return x + self.conv(y)


class Upscaler(nnx.Module):
    """Images ``[b, h, w, channels]`` to ``[b, h*scale, w*scale, channels]``, in the same units.

    A convolution, a residual ``body``, convolutions with pixel shuffles, a convolution. What a
    pixel shuffle takes stays together on a node, so that it moves nothing.

    Args:
      body: makes the residual body, given ``conv``.
      scale: 2, 3 or 4.
      width: channels.
      in_channels: channels of the images, which every node holds.
      result_dtype: what the result travels in, ``"float16"`` say; None: as computed.
      parts: whether each node computes its part of the last convolution from its own channels, and
        the parts travel, instead of the channels that it reads, which are many and twice the size.
      dtype, param_dtype: computed in, and stored in.
    """

    def __init__(
        self,
        body: Callable[..., Callable[[Map], Map]],
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        scale: int,
        width: int,
        in_channels: int = 3,
        result_dtype: str | None = None,
        parts: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
    ):
        require(
            scale in SHUFFLES,
            f"`scale` (={scale}) must be one of {', '.join(map(str, SHUFFLES))}; choose one of "
            "these",
        )
        images = Replicated(in_channels, mesh=mesh)
        first: Layer = partial(
            Conv, kernel_size=(3, 3), pad=True, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        conv: Layer = partial(first, mesh=mesh)
        self.conv = first(in_channels, width, exchange=images)
        self.body = body(conv=conv)
        self.upsample = nnx.List(
            conv(width, width * step**2, unit=step**2) for step in SHUFFLES[scale]
        )
        self.shuffles = nnx.List(PixelShuffle(step, mesh=mesh) for step in SHUFFLES[scale])
        if parts:
            self.head = first(width, in_channels, exchange=Parts(width, mesh=mesh, pad=True))
            self.image: nnx.Module = Sum(in_channels, mesh=mesh, wire_dtype=result_dtype)
        else:
            self.head = conv(width, in_channels)
            self.image = Gather(in_channels, mesh=mesh, always=True, wire_dtype=result_dtype)

    def __call__(self, images: Map) -> Float[Array, "b h2 w2 c"]:
        x = self.body(self.conv(images))
        for conv, shuffle in zip(self.upsample, self.shuffles, strict=True):
            x = shuffle(conv(x))
        return self.image(self.head(x))


class EDSR(Upscaler):
    """EDSR-baseline as it is; the paper's large one has width 256, depth 32 and factor 0.1.

    Args:
      scale: 2, 3 or 4.
      width, depth: channels, and residual blocks.
      factor: what the blocks' results are multiplied by.
      **kwargs: see :class:`Upscaler`.
    """

    def __init__(
        self,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        scale: int = 2,
        width: int = 64,
        depth: int = 16,
        factor: float = 1.0,
        **kwargs: Any,
    ):
        def body(conv: Layer) -> Group:
            blocks = [ResidualBlock(width, factor=factor, conv=conv) for _ in range(depth)]
            return Group(width, blocks, conv=conv)

        super().__init__(body, mesh=mesh, rngs=rngs, scale=scale, width=width, **kwargs)


class RCAN(Upscaler):
    """Residual channel attention (arXiv 1807.02758): groups of blocks that weigh their channels.

    Args:
      scale: 2, 3 or 4.
      width: channels.
      groups, depth: residual groups, and blocks in each.
      reduction: by how much the attention narrows the channels.
      **kwargs: see :class:`Upscaler`.
    """

    def __init__(
        self,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        scale: int = 2,
        width: int = 64,
        groups: int = 10,
        depth: int = 20,
        reduction: int = 16,
        **kwargs: Any,
    ):
        def group(conv: Layer) -> Group:
            blocks = [AttentionBlock(width, reduction=reduction, conv=conv) for _ in range(depth)]
            return Group(width, blocks, conv=conv)

        def body(conv: Layer) -> Group:
            return Group(width, [group(conv) for _ in range(groups)], conv=conv)

        super().__init__(body, mesh=mesh, rngs=rngs, scale=scale, width=width, **kwargs)
