"""SSD (Liu et al. 2016, arXiv 1512.02325): one look at the image, boxes from maps of many sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.exchange import Exchange
from disco_jax.gather import Gather
from disco_jax.layers import BatchNorm, Conv, L2Norm, MaxPool
from disco_jax.mesh import NodeMesh
from disco_jax.models.resnet import Backbone, BasicBlock, Bottleneck
from disco_jax.models.vgg import convolutions, widths
from disco_jax.tasks.boxes import default_boxes

Layer = Callable[..., Any]
Output = dict[str, Float[Array, "..."]]
RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
SCALES = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)
STEPS_300 = (8 / 300, 16 / 300, 32 / 300, 64 / 300, 100 / 300, 300 / 300)
VGG_16 = (2, 2, 3, 3, 3)


class Extra(nnx.Module):
    """1x1 to fewer channels, then 3x3 that makes the map smaller; norms where there are some.

    The head of the map that it reads shares its exchange.
    """

    def __init__(
        self,
        c_in: int,
        middle: int,
        c_out: int,
        *,
        halves: bool,
        mesh: NodeMesh,
        conv: Layer,
        norm: Layer | None,
    ):
        window: dict[str, Any] = {"strides": 2, "padding": 1} if halves else {"padding": "VALID"}
        self.exchange = Exchange(c_in, mesh=mesh, pad=True)
        self.conv1 = conv(c_in, middle, (1, 1), exchange=self.exchange)
        self.conv2 = conv(middle, c_out, (3, 3), mesh=mesh, **window)
        self.norms = nnx.List([norm(middle), norm(c_out)] if norm else [])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        for i, conv in enumerate((self.conv1, self.conv2)):
            x = conv(x)
            x = nnx.relu(self.norms[i](x) if self.norms else x)
        return x


def extras(
    c_in: int, sizes: Sequence[tuple[int, int]], halved: int, **kwargs: Any
) -> Iterator[Extra]:
    """The first ``halved`` halve the map, the others have no border."""
    for i, (middle, c_out) in enumerate(sizes):
        yield Extra(c_in, middle, c_out, halves=i < halved, **kwargs)
        c_in = c_out


class VGGTrunk(nnx.Module):
    """VGG-16 whose dense layers are convolutions, and the extra layers of SSD300: six maps.

    Args:
      width: channels of the first stage; everything else is in proportion.
      extra: how many extra layers; images smaller than 300 pixels have room for fewer than 4.
    """

    def __init__(
        self,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        width: int = 64,
        extra: int = 4,
        in_channels: int = 3,
        **dtypes: Any,
    ):
        conv: Layer = partial(Conv, pad=True, **dtypes, rngs=rngs)
        sizes = widths(VGG_16, width)
        self.convs = convolutions(sizes, in_channels, mesh=mesh, conv=conv)
        # The third gives the last odd row and column a window of their own.
        pads = ("VALID", "VALID", "SAME", "VALID")
        pools = [MaxPool((2, 2), (2, 2), padding, mesh=mesh) for padding in pads]
        self.pools = nnx.List([*pools, MaxPool((3, 3), (1, 1), "SAME", mesh=mesh)])
        self.l2norm = L2Norm(8 * width, mesh=mesh, pad=True)
        window = {"padding": 6, "kernel_dilation": 6}
        self.conv6 = conv(8 * width, 16 * width, (3, 3), mesh=mesh, **window)
        self.conv7 = conv(16 * width, 16 * width, (1, 1), mesh=mesh)
        pairs = [(4 * width, 8 * width), *[(2 * width, 4 * width)] * 3][:extra]
        self.extras = nnx.List(extras(16 * width, pairs, 2, mesh=mesh, conv=conv, norm=None))
        self.widths = (8 * width, 16 * width, *(c_out for _, c_out in pairs))

    def __call__(self, images: Float[Array, "b h w channels"]) -> list[Array]:
        x, maps, convs = images, [], iter(self.convs)
        for stage, (depth, pool) in enumerate(zip(VGG_16, self.pools, strict=True)):
            for conv in itertools.islice(convs, depth):
                x = nnx.relu(conv(x))
            if stage == 3:
                maps.append(self.l2norm(x))
            x = pool(x)
        x = nnx.relu(self.conv7(nnx.relu(self.conv6(x))))
        return _continued(self.extras, x, maps)


class ResNetTrunk(nnx.Module):
    """The first three stages of a ResNet, the third without its stride, and five extra layers.

    Args:
      block, depths: see :class:`disco_jax.models.resnet.Backbone`, as are other keywords.
      width: channels of the first stage; the extra layers' are in proportion.
      extra: how many extra layers; images smaller than 300 pixels have room for fewer than 5.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        width: int = 64,
        extra: int = 5,
        in_channels: int = 3,
        **dtypes: Any,
    ):
        self.backbone = Backbone(
            block,
            depths,
            mesh=mesh,
            rngs=rngs,
            width=width,
            in_channels=in_channels,
            output_stride=8,
            **dtypes,
        )
        self.depths = self.backbone.depths
        conv: Layer = partial(Conv, use_bias=False, pad=True, **dtypes, rngs=rngs)
        norm: Layer = partial(BatchNorm, momentum=0.9, mesh=mesh, pad=True, **dtypes, rngs=rngs)
        last = self.backbone.widths[-1]
        pairs = [*[(4 * width, 8 * width)] * 2, *[(2 * width, 4 * width)] * 3][:extra]
        self.extras = nnx.List(extras(last, pairs, 3, mesh=mesh, conv=conv, norm=norm))
        self.widths = (last, *(c_out for _, c_out in pairs))

    def __call__(self, images: Float[Array, "b h w channels"]) -> list[Array]:
        return _continued(self.extras, self.backbone.features(images)[-1], [])


def _continued(layers: Sequence[Extra], x: Array, maps: list[Array]) -> list[Array]:
    for layer in (None, *layers):
        x = x if layer is None else layer(x)
        maps.append(x)
    return maps


class Head(nnx.Module):
    """Scores of classes and offsets of boxes at every position of a map, which share an exchange.

    What it finds goes to all nodes: a box needs the numbers of several channels.
    """

    def __init__(
        self, exchange: Exchange, boxes: int, classes: int, *, conv: Layer, result_dtype: str | None
    ):
        c_in, mesh = exchange.features, exchange.mesh
        self.classes = classes
        self.scores = conv(c_in, boxes * classes, (3, 3), exchange=exchange)
        self.offsets = conv(c_in, boxes * 4, (3, 3), exchange=exchange)
        gather = partial(Gather, mesh=mesh, always=True, wire_dtype=result_dtype)
        self.gather_scores = gather(boxes * classes)
        self.gather_offsets = gather(boxes * 4)

    def __call__(
        self, x: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b boxes classes"], Float[Array, "b boxes 4"]]:
        readable = self.scores.exchange(x)
        scores = self.gather_scores(self.scores(readable))
        offsets = self.gather_offsets(self.offsets(readable))
        return scores.reshape(len(x), -1, self.classes), offsets.reshape(len(x), -1, 4)


class SSD(nnx.Module):
    """Images ``[b, h, w, channels]`` to scores and boxes, relative to default boxes.

    Returns ``{"scores": [b, boxes, 1 + num_classes], "offsets": [b, boxes, 4], "boxes":
    [boxes, 4]}``: logits, the background's first; codes of boxes relative to the default boxes
    (``tasks.boxes.decode``); and these.

    Args:
      trunk: what makes the maps.
      num_classes: classes of objects, without the background.
      scales, ratios, steps: of the default boxes, see ``tasks.boxes.default_boxes``.
      result_dtype: what scores and offsets travel in, ``"float16"`` say; None: as computed.
      **kwargs: what the trunk takes (``width``, ``extra``, ``in_channels``, ``dtype``, ...).
    """

    def __init__(
        self,
        trunk: Layer,
        num_classes: int = 20,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        scales: Sequence[float] = SCALES,
        ratios: Sequence[Sequence[float]] = RATIOS,
        steps: Sequence[float] | None = None,
        result_dtype: str | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
        **kwargs: Any,
    ):
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.trunk = trunk(mesh=mesh, rngs=rngs, **dtypes, **kwargs)
        count = len(self.trunk.widths)
        require(
            len(scales) > count and len(ratios) >= count,
            f"`scales` (={len(scales)} of them) and `ratios` (={len(ratios)}) must be for the "
            f"{count} maps of the trunk, scales one more; give every map its own",
        )
        self.scales, self.ratios = tuple(scales[: count + 1]), tuple(map(tuple, ratios[:count]))
        self.steps = None if steps is None else tuple(steps[:count])
        conv: Layer = partial(Conv, pad=True, padding=1, **dtypes, rngs=rngs)
        self.heads = nnx.List(
            Head(
                exchange, 2 + 2 * len(beside), 1 + num_classes, conv=conv, result_dtype=result_dtype
            )
            for exchange, beside in zip(self._exchanges(mesh), self.ratios, strict=True)
        )

    def _exchanges(self, mesh: NodeMesh) -> list[Exchange]:
        """Of every map: that of the extra layer which reads it, or one of the head's own."""
        shared = [layer.exchange for layer in self.trunk.extras]
        alone = [Exchange(c_in, mesh=mesh, pad=True) for c_in in self.trunk.widths]
        first = len(alone) - 1 - len(shared)  # the last map is read by its head alone
        return [*alone[:first], *shared, alone[-1]]

    def __call__(self, images: Float[Array, "b h w channels"]) -> Output:
        maps = self.trunk(images)
        found = [head(x) for head, x in zip(self.heads, maps, strict=True)]
        scores, offsets = (jnp.concatenate(parts, 1) for parts in zip(*found, strict=True))
        sizes = [(x.shape[1], x.shape[2]) for x in maps]
        boxes = jnp.asarray(default_boxes(sizes, self.scales, self.ratios, self.steps))
        return {"scores": scores, "offsets": offsets, "boxes": boxes}
