"""Vision transformers: ViT (Dosovitskiy et al. 2021) and DeiT (Touvron et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.exchange import Exchange, Replicated
from disco_jax.gather import Gather
from disco_jax.layers import (
    Conv,
    Dense,
    LayerNorm,
    LayerScale,
    LearnedTokens,
    MultiHeadAttention,
    PositionEmbedding,
    StochasticDepth,
)
from disco_jax.mesh import NodeMesh

Layer = Callable[..., Any]
POOLS = {"class": 1, "distilled": 2, "mean": 0}  # how the tokens become logits, extra tokens


class Mlp(nnx.Module):
    """Two dense layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, *, mesh: NodeMesh, dense: Layer):
        self.dense1 = dense(width, hidden, mesh=mesh)
        self.dense2 = dense(hidden, width, mesh=mesh)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        return self.dense2(nnx.gelu(self.dense1(x), approximate=False))


class Block(nnx.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    ``ends`` make what each branch goes through last: a scale, stochastic depth.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        mesh: NodeMesh,
        dense: Layer,
        attention: Layer,
        norm: Layer,
        ends: tuple[Layer, ...],
    ):
        self.norm1 = norm(width)
        self.attention = attention(heads, width, mesh=mesh)
        self.end1 = nnx.List(end() for end in ends)
        self.norm2 = norm(width)
        self.mlp = Mlp(width, hidden, mesh=mesh, dense=dense)
        self.end2 = nnx.List(end() for end in ends)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        x = x + _through(self.end1, self.attention(self.norm1(x)))
        return x + _through(self.end2, self.mlp(self.norm2(x)))


class VisionTransformer(nnx.Module):
    """Images ``[b, image_size, image_size, channels]`` to logits ``[b, num_classes]``.

    Args:
      width, depth, heads: channels, blocks, attention heads of a block.
      num_classes: size of the logits.
      image_size, patch: of the images, and of the squares that become tokens.
      mlp_ratio: hidden channels of a block's MLP over ``width``.
      pool: ``"class"`` reads the logits off a class token; ``"distilled"`` off a class and a
        distillation token and takes their mean, as DeiT does when it predicts; ``"mean"`` off the
        mean of all tokens.
      position: ``"learned"`` or ``"sincos"``.
      norm_scope: over which channels a LayerNorm goes, ``"all"`` or those of a ``"node"``.
      layer_scale: what the branches' learned factors start from; None for none.
      drop_path: rate at which the last block's branches are dropped in training; it grows from 0.
      epsilon: of the LayerNorms.
      in_channels: channels of the images, which every node holds.
      dtype, param_dtype: computed in, and stored in.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        num_classes: int = 1000,
        *,
        mesh: NodeMesh,
        rngs: nnx.Rngs,
        image_size: int = 224,
        patch: int = 16,
        mlp_ratio: float = 4.0,
        pool: Literal["class", "distilled", "mean"] = "class",
        position: Literal["learned", "sincos"] = "learned",
        norm_scope: Literal["all", "node"] = "all",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        epsilon: float = 1e-6,
        in_channels: int = 3,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = "float32",
    ):
        require(
            pool in POOLS,
            f"`pool` (={pool!r}) must be one of {', '.join(POOLS)}; choose one of these",
        )
        require(
            image_size % patch == 0,
            f"`image_size` (={image_size}) must be divisible by `patch` (={patch}); choose a "
            "multiple",
        )
        add: dict[str, Any] = {"mesh": mesh, "pad": True, "param_dtype": param_dtype}
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        weights = {"kernel_init": nnx.initializers.truncated_normal(0.02), "pad": True, **common}
        dense: Layer = partial(Dense, **weights)
        norm: Layer = partial(
            LayerNorm, mesh=mesh, scope=norm_scope, epsilon=epsilon, pad=True, **common
        )
        grid, extra = image_size // patch, POOLS[pool]
        self.pool = pool
        images = Replicated(in_channels, mesh=mesh)
        self.patches = Conv(
            in_channels, width, (patch, patch), patch, padding="VALID", exchange=images, **weights
        )
        self.tokens = LearnedTokens(extra, width, **add, rngs=rngs) if extra else None
        self.position = PositionEmbedding(
            (grid, grid), width, kind=position, extra=extra, **add, rngs=rngs
        )
        scales = () if layer_scale is None else (partial(LayerScale, width, layer_scale, **add),)

        def drops(share: float) -> tuple[Layer, ...]:
            rate = drop_path * share
            return (partial(StochasticDepth, rate, ndim=3, rngs=rngs),) if rate else ()

        self.blocks = nnx.List(
            Block(
                width,
                heads,
                int(mlp_ratio * width),
                mesh=mesh,
                dense=dense,
                attention=partial(MultiHeadAttention, **weights),
                norm=norm,
                ends=(*scales, *drops(i / max(1, depth - 1))),
            )
            for i in range(depth)
        )
        self.norm = norm(width)
        # One exchange of the pooled tokens for each head: they are different tensors.
        self.heads = nnx.List(
            Dense(width, num_classes, exchange=Exchange(width, mesh=mesh, pad=True), **weights)
            for _ in range(max(1, extra))
        )
        self.logits = Gather(num_classes, mesh=mesh)

    def __call__(self, images: Float[Array, "b h w channels"]) -> Float[Array, "b num_classes"]:
        x = self.patches(images)
        x = jnp.reshape(x, (len(x), -1, x.shape[-1]))
        x = self.position(x if self.tokens is None else self.tokens(x))
        for block in self.blocks:
            x = block(x)
        if self.pool == "mean":
            pooled = [self.norm(x).mean(1)]
        else:
            x = self.norm(x[:, : len(self.heads)])  # the others are not asked any more
            pooled = [x[:, i] for i in range(len(self.heads))]
        found = [head(token) for head, token in zip(self.heads, pooled, strict=True)]
        return self.logits(jnp.mean(jnp.stack(found), 0))


def _through(layers: nnx.List, x: Array) -> Array:
    for layer in layers:
        x = layer(x)
    return x
