"""Messages between the nodes: permutes, and large ones in pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from disco_jax.errors import require
from disco_jax.mesh import NODE

Pairs = Sequence[tuple[int, int]]


def check_message_bytes(most: int | None) -> int | None:
    """Returns ``most`` if it can be the largest size of a message, else raises a DiscoError."""
    require(
        most is None or (isinstance(most, int) and most > 0 and most % 8 == 0),
        f"`message_bytes` (={most!r}) must be a positive multiple of 8, the size of the largest "
        "number; 100_000 is usual",
    )
    return most


def pieces(size: int, most: int | None) -> int:
    """In how many messages so many bytes go.

    >>> [pieces(size, most=100) for size in (1, 100, 101)], pieces(101, most=None)
    ([1, 1, 2], 1)
    """
    return 1 if most is None else -(-size // most)


def permute(
    x: Shaped[Array, "b ..."], pairs: Pairs, most: int | None = None
) -> Shaped[Array, "b ..."]:
    """On a node: gives ``x`` away, and returns what it was given; zeros where that is nothing.

    Args:
      x: the same shape on all nodes.
      pairs: (source, destination), every node at most once as either.
      most: bytes of an example that go at once; what is more goes in pieces, one after another.
    """
    if most is None or pieces(math.prod(x.shape[1:]) * x.dtype.itemsize, most) <= 1:
        return lax.ppermute(x, NODE, pairs)
    flat = jnp.reshape(x, -1)
    piece = x.shape[0] * most // x.dtype.itemsize
    whole = flat.size // piece
    # A loop: a map of a megapixel goes in hundreds of pieces, each of which would be compiled.
    found = lax.map(
        lambda part: lax.ppermute(part, NODE, pairs),
        jnp.reshape(flat[: whole * piece], (whole, piece)),
    )
    found = jnp.reshape(found, -1)
    if flat.size > whole * piece:
        rest = lax.ppermute(flat[whole * piece :], NODE, pairs)
        found = jnp.concatenate([found, rest])
    return jnp.reshape(found, x.shape)
