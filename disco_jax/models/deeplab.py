"""Segmentation: DeepLabV3 (Chen et al. 2017, arXiv 1706.05587), and LR-ASPP for small devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.exchange import Exchange, Replicated
from disco_jax.gather import Gather
from disco_jax.layers import BatchNorm, Conv, GlobalPool, Resize, resize
from disco_jax.mesh import NodeMesh
from disco_jax.models.resnet import Backbone, BasicBlock, Bottleneck

Layer = Callable[..., Any]
Logits = Float[Array, "b h w classes"]


class ConvNorm(nnx.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, *args: Any, conv: Layer, norm: Layer, **kwargs: Any):
        self.conv = conv(c_in, c_out, *args, **kwargs)
        self.norm = norm(c_out)

    def __call__(self, x: Any) -> Float[Array, "b h w c"]:
        return nnx.relu(self.norm(self.conv(x)))


class ASPP(nnx.Module):
    """Atrous spatial pyramid pooling: one map read through windows of several sizes at once.

    The windows share one exchange. The 1x1 convolution of their concatenation is the sum of a 1x1
    convolution of each: so the pooled branch, the same everywhere, crosses the link once and not
    once for each pixel, and no channel changes its owner.
    """

    def __init__(
        self,
        c_in: int,
        width: int,
        rates: Sequence[int],
        *,
        mesh: NodeMesh,
        conv: Layer,
        norm: Layer,
    ):
        add: dict[str, Any] = {"conv": conv, "norm": norm}
        self.exchange = Exchange(c_in, mesh=mesh, pad=True)
        branches = [ConvNorm(c_in, width, (1, 1), exchange=self.exchange, **add)]
        for rate in rates:
            window: dict[str, Any] = {"padding": rate, "kernel_dilation": rate}
            branches.append(ConvNorm(c_in, width, (3, 3), exchange=self.exchange, **window, **add))
        self.branches = nnx.List(branches)
        self.mean = GlobalPool(keepdims=True, mesh=mesh)
        self.pooled = ConvNorm(c_in, width, (1, 1), mesh=mesh, **add)
        self.project = nnx.List(
            conv(width, width, (1, 1), mesh=mesh) for _ in range(len(branches) + 1)
        )
        self.norm = norm(width)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w width"]:
        readable = self.exchange(x)
        seen = [branch(readable) for branch in self.branches]
        seen.append(self.pooled(self.mean(x)))
        return nnx.relu(self.norm(sum(p(y) for p, y in zip(self.project, seen, strict=True))))


class Auxiliary(nnx.Module):
    """What the paper's code trains beside the main head, on the stage before the last (FCN).

    It is not there in evaluation, so it has no mask of its own: it shares the exchange of the last
    stage's first block, and its hidden channels go to all nodes.
    """

    def __init__(self, c_in: int, classes: int, *, exchange: Exchange, conv: Layer, norm: Layer):
        self.hidden = ConvNorm(
            c_in, c_in // 4, (3, 3), padding=1, exchange=exchange, conv=conv, norm=norm
        )
        mesh, hidden = exchange.mesh, c_in // 4
        self.everywhere = Gather(hidden, mesh=mesh, always=True)
        self.head = conv(
            hidden, classes, (1, 1), exchange=Replicated(hidden, mesh=mesh), use_bias=True
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Logits:
        return self.head(self.everywhere(self.hidden(x)))


class DeepLabV3(nnx.Module):
    """Images ``[b, h, w, channels]`` to logits ``[b, h, w, num_classes]``.

    Args:
      block, depths: of the ResNet, see :class:`disco_jax.models.resnet.Backbone`, as are other
        keywords (``width``, ``in_channels``, ...).
      num_classes: classes of pixels, the background's included.
      output_stride: pixels of the image for one of the map that the head reads.
      head_width: channels of the head.
      rates: of dilation, for an output stride of 16; twice that for 8.
      dropout: rate behind the pyramid, in training.
      auxiliary: whether training has a second head, on the third stage: the model then returns the
        logits of both; in evaluation those of the main head alone.
      result_dtype: what logits travel in, ``"float16"`` say; None: as computed.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 21,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        output_stride: int = 8,
        head_width: int = 256,
        rates: Sequence[int] = (6, 12, 18),
        dropout: float = 0.5,
        auxiliary: bool = False,
        result_dtype: str | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
        **kwargs: Any,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        conv: Layer = partial(Conv, use_bias=False, pad=True, **dtypes, rngs=rngs)
        norm: Layer = partial(BatchNorm, momentum=0.9, mesh=mesh, pad=True, **dtypes, rngs=rngs)
        add: dict[str, Any] = {"conv": conv, "norm": norm}
        self.backbone = Backbone(
            block, depths, mesh=mesh, rngs=rngs, output_stride=output_stride, **dtypes, **kwargs
        )
        self.depths, c_in = self.backbone.depths, self.backbone.widths[-1]
        rates = [rate * 16 // output_stride for rate in rates]
        self.aspp = ASPP(c_in, head_width, rates, mesh=mesh, **add)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.hidden = ConvNorm(head_width, head_width, (3, 3), padding=1, mesh=mesh, **add)
        self.head = conv(head_width, num_classes, (1, 1), mesh=mesh, use_bias=True)
        self.logits = Gather(num_classes, mesh=mesh, always=True, wire_dtype=result_dtype)
        self.deterministic = False  # as Dropout has it: True in evaluation
        self.auxiliary: Auxiliary | None = nnx.data(None)
        if auxiliary:  # reads the exchange of the last stage's first block
            last = self.backbone.blocks[-self.depths[-1]].exchange
            self.auxiliary = Auxiliary(last.features, num_classes, exchange=last, **add)

    def __call__(self, images: Float[Array, "b h w channels"]) -> Logits | tuple[Logits, Logits]:
        *_, before, last = self.backbone.features(images)
        x = self.dropout(self.aspp(last))
        logits = self._full_size(self.head(self.hidden(x)), images)
        if self.auxiliary is None or self.deterministic:
            return logits
        return logits, self._full_size(self.auxiliary(before), images)

    def _full_size(self, x: Array, images: Array) -> Logits:
        # A small map crosses the link, not the large one.
        return resize(self.logits(x), images.shape[1:3])


class LRASPP(nnx.Module):
    """Images to logits at the size of the images: the light head of MobileNetV3.

    (Howard et al. 2019, arXiv 1905.02244, figure 10), here on a ResNet: the last map, weighted
    channel by channel by what the whole image shows, beside the map of twice its size.
    Arguments are those of :class:`DeepLabV3`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        num_classes: int = 21,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        output_stride: int = 16,
        head_width: int = 128,
        result_dtype: str | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
        **kwargs: Any,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        conv: Layer = partial(Conv, mesh=mesh, pad=True, **dtypes, rngs=rngs)
        norm: Layer = partial(BatchNorm, momentum=0.9, mesh=mesh, pad=True, **dtypes, rngs=rngs)
        self.backbone = Backbone(
            block, depths, mesh=mesh, rngs=rngs, output_stride=output_stride, **dtypes, **kwargs
        )
        self.depths, widths = self.backbone.depths, self.backbone.widths
        exact: Layer = partial(conv, use_bias=False)
        self.hidden = ConvNorm(widths[-1], head_width, (1, 1), conv=exact, norm=norm)
        self.mean = GlobalPool(keepdims=True, mesh=mesh)
        self.enlarge = Resize(mesh=mesh)
        self.weights = exact(widths[-1], head_width, (1, 1))
        self.low = conv(widths[-3], num_classes, (1, 1))
        self.high = conv(head_width, num_classes, (1, 1))
        self.logits = Gather(num_classes, mesh=mesh, always=True, wire_dtype=result_dtype)

    def __call__(self, images: Float[Array, "b h w channels"]) -> Logits:
        *_, low, _, high = self.backbone.features(images)
        weights = nnx.sigmoid(self.weights(self.mean(high)))
        # A 1x1 convolution and an interpolation may change places: the smaller map is read.
        x = self.high(self.hidden(high) * weights)
        fine = self.low(low)
        x = fine + self.enlarge(x, fine.shape[1:3])
        return resize(self.logits(x), images.shape[1:3])
