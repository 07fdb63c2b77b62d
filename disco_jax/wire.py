"""What really travels: the wire dtypes and their conversions.

XLA:CPU sends a bfloat16 collective as float32, so bfloat16 crosses the link as the uint16 that
holds the same bits; every other dtype here travels as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from disco_jax.errors import require

WIRE_DTYPES = ("float64", "float32", "bfloat16", "float16")


def check_wire_dtype(wire_dtype: str) -> str:
    """Returns ``wire_dtype`` if it can cross a link, else raises a DiscoError."""
    require(
        wire_dtype in WIRE_DTYPES,
        f"`wire_dtype` (={wire_dtype!r}) must be one of {', '.join(WIRE_DTYPES)}; "
        "pass wire_dtype=None to send what is computed",
    )
    return wire_dtype


def itemsize(wire_dtype: str) -> int:
    """Bytes that one number takes on the wire."""
    return jnp.dtype(check_wire_dtype(wire_dtype)).itemsize


def encode(x: Float[Array, "..."], wire_dtype: str) -> Shaped[Array, "..."]:
    """Converts what is computed to what travels."""
    x = x.astype(wire_dtype)
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if wire_dtype == "bfloat16" else x


def decode(
    y: Shaped[Array, "..."], wire_dtype: str, dtype: jax.typing.DTypeLike
) -> Float[Array, "..."]:
    """Converts what travelled back to the dtype computed in."""
    if wire_dtype == "bfloat16":
        y = jax.lax.bitcast_convert_type(y, jnp.bfloat16)
    return y.astype(dtype)
