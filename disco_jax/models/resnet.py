"""ResNet (He et al. 2016), with the stride on the 3x3 convolution as torchvision has it (v1.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.exchange import Exchange, Replicated
from disco_jax.gather import Gather
from disco_jax.layers import BatchNorm, Conv, Dense, GlobalPool, MaxPool
from disco_jax.mesh import NodeMesh
from disco_jax.readable import Readable

Layer = Callable[..., Any]
STEMS = {"imagenet": ((7, 7), 2), "cifar": ((3, 3), 1)}  # kernel, stride


class Residual(nnx.Module):
    """``relu(body(x) + shortcut(x))``; one exchange serves the first conv and the projection."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, *, mesh: NodeMesh, conv: Layer, norm: Layer
    ):
        self.exchange = Exchange(c_in, mesh=mesh, pad=True)
        self.projects = stride != 1 or c_in != c_out
        if self.projects:
            self.projection = conv(c_in, c_out, (1, 1), stride, exchange=self.exchange)
            self.projection_norm = norm(c_out)

    def body(self, x: Readable) -> Array:
        raise NotImplementedError

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        readable = self.exchange(x)
        shortcut = self.projection_norm(self.projection(readable)) if self.projects else x
        return nnx.relu(self.body(readable) + shortcut)


class BasicBlock(Residual):
    """3x3, 3x3 (ResNet-18, 34 and the CIFAR variants)."""

    expansion = 1

    def __init__(
        self,
        c_in: int,
        width: int,
        stride: int,
        dilation: int = 1,
        *,
        mesh: NodeMesh,
        conv: Layer,
        norm: Layer,
    ):
        super().__init__(c_in, width, stride, mesh=mesh, conv=conv, norm=norm)
        window: dict[str, Any] = {"padding": dilation, "kernel_dilation": dilation}
        self.conv1 = conv(c_in, width, (3, 3), stride, exchange=self.exchange, **window)
        self.norm1 = norm(width)
        self.conv2 = conv(width, width, (3, 3), mesh=mesh, **window)
        self.norm2 = norm(width, scale_init=nnx.initializers.zeros)

    def body(self, x: Readable) -> Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(y))


class Bottleneck(Residual):
    """1x1, 3x3, 1x1 (ResNet-50, 101, 152)."""

    expansion = 4

    def __init__(
        self,
        c_in: int,
        width: int,
        stride: int,
        dilation: int = 1,
        *,
        mesh: NodeMesh,
        conv: Layer,
        norm: Layer,
    ):
        c_out = self.expansion * width
        super().__init__(c_in, c_out, stride, mesh=mesh, conv=conv, norm=norm)
        self.conv1 = conv(c_in, width, (1, 1), exchange=self.exchange)
        self.norm1 = norm(width)
        window: dict[str, Any] = {"padding": dilation, "kernel_dilation": dilation}
        self.conv2 = conv(width, width, (3, 3), stride, mesh=mesh, **window)
        self.norm2 = norm(width)
        self.conv3 = conv(width, c_out, (1, 1), mesh=mesh)
        self.norm3 = norm(c_out, scale_init=nnx.initializers.zeros)

    def body(self, x: Readable) -> Array:
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        return self.norm3(self.conv3(y))


class Backbone(nnx.Module):
    """A ResNet without its head: images ``[b, h, w, channels]`` to one map for each stage.

    Args:
      block: :class:`BasicBlock` or :class:`Bottleneck`.
      depths: blocks in each stage; a stage has twice the width of the one before.
      width: channels of the first stage, before expansion.
      stem: ``"imagenet"`` (7x7 stride 2, max pool) or ``"cifar"`` (3x3).
      output_stride: pixels of the image for one of the last map. Stages that would go beyond it are
        dilated instead (Chen et al. 2017, arXiv 1706.05587). None: 2 for each stage but the first.
      in_channels: channels of the images, which every node holds.
      dtype, param_dtype: computed in, and stored in.

    Attributes:
      widths: channels of each stage's map.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        width: int = 64,
        stem: str = "imagenet",
        output_stride: int | None = None,
        in_channels: int = 3,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
        conv: Layer = partial(
            Conv, use_bias=False, kernel_init=he_normal, pad=True, **dtypes, rngs=rngs
        )
        norm: Layer = partial(BatchNorm, momentum=0.9, mesh=mesh, pad=True, **dtypes, rngs=rngs)
        require(
            stem in STEMS,
            f"`stem` (={stem!r}) must be one of {', '.join(STEMS)}; choose one of these",
        )
        kernel, stride = STEMS[stem]
        images = Replicated(in_channels, mesh=mesh)
        self.stem, self.depths = stem, tuple(depths)
        self.conv = conv(
            in_channels, width, kernel, stride, padding=kernel[0] // 2, exchange=images
        )
        self.norm = norm(width)
        self.pool = MaxPool((3, 3), (2, 2), ((1, 1), (1, 1)), mesh=mesh)
        self.widths = tuple(width * 2**stage * block.expansion for stage in range(len(depths)))
        strides = _strides(len(depths), stride**2, output_stride)  # a pool follows a strided stem
        blocks, c_in = [], width
        for stage, (depth, (stride, before, dilation)) in enumerate(
            zip(depths, strides, strict=True)
        ):
            for i in range(depth):
                window = (stride, before) if i == 0 else (1, dilation)
                blocks.append(
                    block(c_in, width * 2**stage, *window, mesh=mesh, conv=conv, norm=norm)
                )
                c_in = self.widths[stage]
        self.blocks = nnx.List(blocks)

    def features(self, images: Float[Array, "b h w channels"]) -> list[Float[Array, "b h2 w2 _"]]:
        """What each stage makes of the images."""
        x = nnx.relu(self.norm(self.conv(images)))
        if self.stem == "imagenet":
            x = self.pool(x)
        maps, blocks = [], iter(self.blocks)
        for depth in self.depths:
            for _ in range(depth):
                x = next(blocks)(x)
            maps.append(x)
        return maps


def _strides(stages: int, start: int, most: int | None) -> list[tuple[int, int, int]]:
    """Stride of each stage, and the dilation of its first block and of its others.

    >>> _strides(4, 4, 8)
    [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 4)]
    """
    found, reached, dilation = [], start, 1
    require(
        most is None or (most >= start and most & (most - 1) == 0),
        f"`output_stride` (={most}) must be a power of 2 and at least {start}, that of the stem; "
        "8 and 16 are usual",
    )
    for stage in range(stages):
        stride, before = 1 if stage == 0 else 2, dilation
        if most is not None and reached * stride > most:
            dilation, stride = dilation * stride, 1
        reached *= stride
        found.append((stride, before, dilation))
    return found


class ResNet(Backbone):
    """Images ``[b, h, w, channels]`` to logits ``[b, num_classes]``; other arguments as above."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 1000,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(block, depths, mesh=mesh, rngs=rngs, **kwargs)
        dtypes = {k: v for k, v in kwargs.items() if k in ("dtype", "param_dtype")}
        self.mean = GlobalPool(mesh=mesh)
        self.head = Dense(self.widths[-1], num_classes, mesh=mesh, pad=True, **dtypes, rngs=rngs)
        self.logits = Gather(num_classes, mesh=mesh)

    def __call__(self, images: Float[Array, "b h w channels"]) -> Float[Array, "b num_classes"]:
        *_, x = self.features(images)
        return self.logits(self.head(self.mean(x)))
