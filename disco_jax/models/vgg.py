"""VGG (Simonyan & Zisserman 2015, arXiv 1409.1556)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.exchange import Replicated
from disco_jax.gather import Gather
from disco_jax.layers import Conv, Dense, GlobalPool, MaxPool
from disco_jax.mesh import NodeMesh


def widths(depths: Sequence[int], width: int) -> list[int]:
    """Channels of every convolution: 1, 2, 4, 8 and 8 times ``width``, stage by stage.

    >>> widths((1, 2), 64)
    [64, 128, 128]
    """
    return [min(8, 2**i) * width for i, depth in enumerate(depths) for _ in range(depth)]


def convolutions(
    sizes: Sequence[int], in_channels: int, *, mesh: NodeMesh, conv: Callable[..., Conv]
) -> nnx.List:
    """3x3 convolutions one after another, the first of which reads the images."""
    images = Replicated(in_channels, mesh=mesh)
    found = [conv(in_channels, sizes[0], (3, 3), exchange=images)]
    found += [conv(c_in, c_out, (3, 3), mesh=mesh) for c_in, c_out in itertools.pairwise(sizes)]
    return nnx.List(found)


class VGG(nnx.Module):
    """Images ``[b, h, w, channels]`` to logits ``[b, num_classes]``.

    The first dense layer is a convolution with its whole 7x7 window, so that larger images give
    more than one answer, whose mean counts: the paper's dense evaluation.

    Args:
      depths: convolutions of each stage, with 1, 2, 4, 8 and 8 times ``width`` channels.
      num_classes: size of the logits.
      width: channels of the first stage.
      hidden: channels of the two dense layers before the last.
      dropout: rate behind each of them, in training.
      in_channels: channels of the images, which every node holds.
      dtype, param_dtype: computed in, and stored in.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int = 1000,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        width: int = 64,
        hidden: int = 4096,
        dropout: float = 0.5,
        in_channels: int = 3,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
    ):
        weights: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv: Callable[..., Conv] = partial(Conv, pad=True, **weights)
        dense: Callable[..., Dense] = partial(Dense, mesh=mesh, pad=True, **weights)
        sizes = widths(depths, width)
        self.depths = tuple(depths)
        self.convs = convolutions(sizes, in_channels, mesh=mesh, conv=conv)
        self.pools = nnx.List(MaxPool((2, 2), (2, 2), mesh=mesh) for _ in depths)
        self.dense1 = Conv(
            sizes[-1], hidden, (7, 7), padding="VALID", mesh=mesh, pad=True, **weights
        )
        self.dense2 = dense(hidden, hidden)
        self.head = dense(hidden, num_classes)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.mean = GlobalPool(mesh=mesh)
        self.logits = Gather(num_classes, mesh=mesh)

    def features(self, images: Float[Array, "b h w channels"]) -> Float[Array, "b h32 w32 c"]:
        """What the convolutions make of the images: a 32nd of their height and width."""
        x, convs = images, iter(self.convs)
        for depth, pool in zip(self.depths, self.pools, strict=True):
            for _ in range(depth):
                x = nnx.relu(next(convs)(x))
            x = pool(x)
        return x

    def __call__(self, images: Float[Array, "b h w channels"]) -> Float[Array, "b num_classes"]:
        x = self.dropout(nnx.relu(self.dense1(self.features(images))))
        x = self.dropout(nnx.relu(self.dense2(x)))
        return self.logits(self.mean(self.head(x)))
