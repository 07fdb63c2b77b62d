"""Layers whose channels are shared by the nodes, with signatures as in ``flax.nnx``."""

from disco_jax.layers.attention import MultiHeadAttention
from disco_jax.layers.conv import Conv
from disco_jax.layers.dense import Dense
from disco_jax.layers.embed import LayerScale, LearnedTokens, PositionEmbedding, StochasticDepth
from disco_jax.layers.local import (
    avg_pool,
    concat,
    flatten,
    global_avg_pool,
    max_pool,
    pixel_shuffle,
    resize,
    split,
)
from disco_jax.layers.norm import BatchNorm, GroupNorm, L2Norm, LayerNorm
from disco_jax.layers.spatial import Concat, GlobalPool, MaxPool, PixelShuffle, Resize

__all__ = [
    "BatchNorm",
    "Concat",
    "Conv",
    "Dense",
    "GlobalPool",
    "GroupNorm",
    "L2Norm",
    "LayerNorm",
    "LayerScale",
    "LearnedTokens",
    "MaxPool",
    "MultiHeadAttention",
    "PixelShuffle",
    "PositionEmbedding",
    "Resize",
    "StochasticDepth",
    "avg_pool",
    "concat",
    "flatten",
    "global_avg_pool",
    "max_pool",
    "pixel_shuffle",
    "resize",
    "split",
]
