"""What really travels: the wire dtypes and their conversions.

XLA:CPU sends a bfloat16 collective as float32, so bfloat16 crosses the link as the uint16 that
holds the same bits; every other dtype here travels as it is. int8 is affine, with a calibrated
range for every channel that both ends know, so that only the codes travel.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from disco_jax.errors import require

WIRE_DTYPES = ("float64", "float32", "bfloat16", "float16", "int8")
LEVELS = 256
Scale = Float[Array, "2 ..."]  # the lowest value and the step between two codes, per channel


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


def calibrated(wire_dtype: str | None) -> bool:
    """Whether a wire dtype needs to know the range of what it carries."""
    return wire_dtype == "int8"


def scale(low: Float[np.ndarray, "c"], high: Float[np.ndarray, "c"]) -> Float[np.ndarray, "2 c"]:
    """The int8 codes of a range: ``low`` is the first of 256, ``high`` the last."""
    step = np.maximum(high - low, np.finfo(np.float32).tiny * LEVELS) / (LEVELS - 1)
    return np.stack([low, step]).astype(np.float32)


def encode(
    x: Float[Array, "..."], wire_dtype: str, scale: Scale | None = None
) -> Shaped[Array, "..."]:
    """Converts what is computed to what travels; ``scale`` is for int8 and clips."""
    if scale is not None:
        code = jnp.round((x - scale[0]) / scale[1]) - LEVELS // 2
        return jnp.clip(code, -LEVELS // 2, LEVELS // 2 - 1).astype(wire_dtype)
    x = x.astype(wire_dtype)
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if wire_dtype == "bfloat16" else x


def decode(
    y: Shaped[Array, "..."],
    wire_dtype: str,
    dtype: jax.typing.DTypeLike,
    scale: Scale | None = None,
) -> Float[Array, "..."]:
    """Converts what travelled back to the dtype computed in.

    >>> s = jnp.asarray(scale(np.array([0.0]), np.array([255.0])))
    >>> decode(encode(jnp.array([7.3, 999.0]), "int8", s), "int8", "float32", s).tolist()
    [7.0, 255.0]
    """
    if scale is not None:
        return ((y.astype(jnp.float32) + LEVELS // 2) * scale[1] + scale[0]).astype(dtype)
    if wire_dtype == "bfloat16":
        y = jax.lax.bitcast_convert_type(y, jnp.bfloat16)
    return y.astype(dtype)
