"""What transformers add to their tokens: places, learned tokens, scales, depth that comes and goes.

All of it is per channel, so every node holds the part of its own channels.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.layers.weights import split_channels
from disco_jax.mesh import NodeMesh
from disco_jax.partition import padded


def _placed(value: Float[Array, "... c"], mesh: NodeMesh, pad: bool) -> Float[Array, "... padded"]:
    return split_channels(value, padded(value.shape[-1], mesh.nodes, pad=pad), mesh)


class Constant(nnx.Variable):
    """Numbers that are part of a model but never learned."""


class PositionEmbedding(nnx.Module):
    """Adds to every token what says where it is: ``[b, t, c] -> [b, t, c]``.

    Args:
      grid: rows and columns of the tokens.
      features: number of channels.
      kind: ``"learned"``, or ``"sincos"`` (fixed; Vaswani et al. 2017, in two dimensions as in
        Chen et al. 2021, arXiv 2104.02057).
      extra: tokens before those of the grid (class, distillation); the fixed kind gives them 0.
      pad: append dead channels where ``features`` does not divide by the nodes, here and below.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        features: int,
        *,
        mesh: NodeMesh,
        kind: Literal["learned", "sincos"] = "learned",
        extra: int = 0,
        pad: bool = False,
        param_dtype: jax.typing.DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        require(
            kind in ("learned", "sincos"),
            f"`kind` (={kind!r}) of the position embedding must be 'learned' or 'sincos'; choose "
            "one",
        )
        shape = (1, extra + grid[0] * grid[1], features)
        if kind == "learned":
            value = 0.02 * jax.random.normal(rngs.params(), shape, param_dtype)
        else:
            table = np.pad(sincos(grid, features), ((extra, 0), (0, 0)))
            value = jnp.asarray(table[None], param_dtype)
        variable = nnx.Param if kind == "learned" else Constant
        self.embedding = variable(_placed(value, mesh, pad))

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        tokens = self.embedding.shape[1]
        require(
            x.shape[1] == tokens,
            f"`tokens` (={x.shape[1]}) must be the {tokens} that have a position embedding; give "
            "images of the size that the model was built for",
        )
        return x + self.embedding[...].astype(x.dtype)


def sincos(grid: tuple[int, int], features: int) -> Float[np.ndarray, "t c"]:
    """Sines and cosines of row and column at ``features / 4`` wavelengths from 1 to 10,000.

    >>> sincos((1, 2), 4).round(2).tolist()
    [[0.0, 1.0, 0.0, 1.0], [0.84, 0.54, 0.0, 1.0]]
    """
    require(
        features % 4 == 0,
        f"`features` (={features}) must be divisible by 4 for sines and cosines of two axes; "
        "choose a multiple, or kind='learned'",
    )
    omega = 10000.0 ** -(np.arange(features // 4) / (features // 4))
    rows, columns = (axis.ravel()[:, None] * omega for axis in np.mgrid[: grid[0], : grid[1]])
    waves = [np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)]
    return np.concatenate(waves, axis=1)


class LearnedTokens(nnx.Module):
    """Puts ``count`` learned tokens (class, distillation) before the others, on axis 1."""

    def __init__(
        self,
        count: int,
        features: int,
        *,
        mesh: NodeMesh,
        pad: bool = False,
        param_dtype: jax.typing.DTypeLike = "float32",
        rngs: nnx.Rngs,
    ):
        value = 0.02 * jax.random.normal(rngs.params(), (1, count, features), param_dtype)
        self.tokens = nnx.Param(_placed(value, mesh, pad))

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b count+t c"]:
        tokens = jnp.broadcast_to(
            self.tokens[...].astype(x.dtype), (len(x), *self.tokens.shape[1:])
        )
        return jnp.concatenate([tokens, x], axis=1)


class LayerScale(nnx.Module):
    """Multiplies every channel by a learned factor (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(
        self,
        features: int,
        init: float = 1e-5,
        *,
        mesh: NodeMesh,
        pad: bool = False,
        param_dtype: jax.typing.DTypeLike = "float32",
    ):
        value = jnp.full((features,), init, param_dtype)
        self.scale = nnx.Param(_placed(value, mesh, pad))

    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        return x * self.scale[...].astype(x.dtype)


class StochasticDepth(nnx.Dropout):
    """Drops a residual branch for whole examples (Huang et al. 2016, arXiv 1603.09382).

    ``flax.nnx.Dropout`` with one draw for each example of ``ndim`` axes.
    """

    def __init__(self, rate: float, *, ndim: int, rngs: nnx.Rngs, **kwargs: Any):
        super().__init__(rate, broadcast_dims=range(1, ndim), rngs=rngs, **kwargs)
