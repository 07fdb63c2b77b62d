"""Messages between the nodes: permutes, and large ones in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from numbers import Integral

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from disco_jax.errors import require
from disco_jax.mesh import NODE

Pairs = Sequence[tuple[int, int]]

# Bytes that a message has at most, all of a device's examples together. It is a matter of the whole
# program, whose modules do not know how many examples there are: some fold other axes into that of
# the batch. JAX traces what it has compiled again where the value is another.
_limit = jax.make_user_context(default_value=None)


def limited(message_bytes: int | None, examples: int) -> AbstractContextManager[None]:
    """While a program of so many examples on each device is traced: cuts its messages.

    Args:
      message_bytes: what a message has at most per example; None: any size.
      examples: of a device.
    """
    return _limit(None if message_bytes is None else message_bytes * max(1, examples))


def check_message_bytes(most: int | None) -> int | None:
    """Returns ``most`` if it can be the largest size of a message, else raises a DiscoError."""
    require(
        most is None or (isinstance(most, Integral) and most > 0 and most % 8 == 0),
        f"`message_bytes` (={most!r}) must be an integer, a positive multiple of 8, which is the "
        "size of the largest number; 100_000 is usual",
    )
    return None if most is None else int(most)


def pieces(size: int, most: int | None) -> int:
    """In how many messages so many bytes go.

    >>> [pieces(size, most=100) for size in (1, 100, 101)], pieces(101, most=None)
    ([1, 1, 2], 1)
    """
    return 1 if most is None else -(-size // most)


def ring(nodes: int, offset: int) -> Pairs:
    """(source, destination): every node to the one so many places on.

    >>> ring(3, 2)
    ((0, 2), (1, 0), (2, 1))
    """
    return tuple((source, (source + offset) % nodes) for source in range(nodes))


def permute(x: Shaped[Array, "b ..."], pairs: Pairs) -> Shaped[Array, "b ..."]:
    """On a node: gives ``x`` away, and returns what it was given; zeros where that is nothing.

    What is larger than a message may be (:func:`limited`) goes in pieces, one after another.

    Args:
      x: the same shape on all nodes.
      pairs: (source, destination), every node at most once as either.
    """
    most: int | None = _limit.value
    if most is None or pieces(x.size * x.dtype.itemsize, most) <= 1:
        return lax.ppermute(x, NODE, pairs)
    flat = jnp.reshape(x, -1)
    piece = most // x.dtype.itemsize
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
