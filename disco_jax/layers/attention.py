"""Multi-head attention whose heads are shared by the nodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.exchange import Exchange, Reader
from disco_jax.layers.dense import Dense
from disco_jax.layers.weights import reader
from disco_jax.mesh import NodeMesh
from disco_jax.partition import per_node
from disco_jax.readable import Readable, note


class DotProductAttention(nnx.Module):
    """``softmax(Q Kᵀ / √head_dim) V`` of each head, on the node that owns it.

    Args:
      features: channels of all heads together, dead ones excluded.
      head_dim: channels of one.
    """

    def __init__(self, features: int, head_dim: int, *, mesh: NodeMesh):
        self.features, self.head_dim, self.mesh = features, head_dim, mesh

    def __call__(
        self,
        query: Float[Array, "b t c"],
        key: Float[Array, "b t kv"],
        value: Float[Array, "b t kv"],
    ) -> Float[Array, "b t c"]:
        heads = per_node(self._attend, query, key, value, mesh=self.mesh)
        note(self, heads)
        return heads

    def _attend(self, *blocks: Float[Array, "b t h*d"]) -> Float[Array, "b t h*d"]:
        q, k, v = (jnp.reshape(x, (*x.shape[:-1], -1, self.head_dim)) for x in blocks)
        return jnp.reshape(jax.nn.dot_product_attention(q, k, v), blocks[0].shape)

    @staticmethod
    def macs(tokens: int, channels: int) -> int:
        """Multiplications per example: a product with the keys, one with the values."""
        return 2 * tokens**2 * channels


class MultiHeadAttention(nnx.Module):
    """Self-attention (Vaswani et al. 2017); a node computes whole heads.

    ``out(softmax(Q Kᵀ / √head_dim) V)``: query, key and value read one exchange, the attention
    itself moves nothing, and the output projection reads a second exchange. Takes owned features
    ``[b, tokens, in_features]`` or the :class:`Readable` of a shared exchange; returns owned
    features ``[b, tokens, out_features]``.

    Args:
      num_heads, in_features, qkv_features, out_features: as in ``flax.nnx.MultiHeadAttention``.
      num_kv_heads: heads of key and value, each for ``num_heads / num_kv_heads`` queries
        (grouped-query attention, Ainslie et al. 2023); ``num_heads`` by default.
      mesh: the nodes.
      exchange: a shared exchange to read instead of one of the layer's own.
      pad: append dead heads (and features) where they do not divide by the nodes.
      **kwargs: what ``Dense`` takes (``use_bias``, ``dtype``, ``kernel_init``, ...).

    Raises:
      DiscoError: if features do not divide by heads, or heads by key-value heads or by the nodes.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        *,
        mesh: NodeMesh | None = None,
        exchange: Reader | None = None,
        pad: bool = False,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        features = qkv_features or in_features
        kv_heads = num_kv_heads or num_heads
        require(
            features % num_heads == 0,
            f"`qkv_features` (={features}) must be divisible by `num_heads` (={num_heads}); choose "
            "a multiple",
        )
        require(
            num_heads % kv_heads == 0,
            f"`num_heads` (={num_heads}) must be divisible by `num_kv_heads` (={kv_heads}); choose "
            "a divisor",
        )
        self.exchange = reader(in_features, exchange=exchange, mesh=mesh, pad=pad)
        mesh = self.exchange.mesh
        head_dim = features // num_heads
        unit = num_heads // kv_heads * head_dim  # the queries of one key stay with it
        dense: Callable[..., Dense] = partial(Dense, pad=pad, rngs=rngs, **kwargs)
        read: Callable[..., Dense] = partial(dense, in_features, exchange=self.exchange)
        self.query = read(features, unit=unit)
        self.key = read(kv_heads * head_dim, unit=head_dim)
        self.value = read(kv_heads * head_dim, unit=head_dim)
        self.attend = DotProductAttention(features, head_dim, mesh=mesh)
        heads = Exchange(features, mesh=mesh, pad=pad, unit=unit)
        self.out = dense(features, out_features or in_features, exchange=heads)

    def __call__(self, inputs: Float[Array, "b t c_in"] | Readable) -> Float[Array, "b t c_out"]:
        x = inputs if isinstance(inputs, Readable) else self.exchange(inputs)
        return self.out(self.attend(self.query(x), self.key(x), self.value(x)))
