"""What really travels: the wire dtypes and their conversions.

XLA:CPU sends a bfloat16 collective as float32, so bfloat16 crosses the link as the uint16 that
holds the same bits; every other float travels as it is. The integers are affine, with a calibrated
range for every channel that both ends know, so that only the codes travel, two of int4 in a byte.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from disco_jax.errors import require

BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
INTEGERS = ("int8", "int4")
# Multiplications in whose time a core packs and unpacks a byte: 136 and 282 on two x86 cores.
# Other conversions took no time that could be measured.
PACKING_MACS = {"int4": 200}
Scale = Float[Array, "2 ..."]  # the lowest value and the step between two codes, per channel


def check_wire_dtype(wire_dtype: str) -> str:
    """Returns ``wire_dtype`` if it can cross a link, else raises a DiscoError."""
    require(
        wire_dtype in BITS,
        f"`wire_dtype` (={wire_dtype!r}) must be one of {', '.join(BITS)}; "
        "pass wire_dtype=None to send what is computed",
    )
    return wire_dtype


def nbytes(count: int, wire_dtype: str) -> int:
    """Bytes of a message of ``count`` numbers.

    >>> [nbytes(3, d) for d in ("float32", "float16", "int8", "int4")]
    [12, 6, 3, 2]
    """
    return -(-count * BITS[check_wire_dtype(wire_dtype)] // 8)


def calibrated(wire_dtype: str | None) -> bool:
    """Whether a wire dtype needs to know the range of what it carries."""
    return wire_dtype in INTEGERS


def levels(wire_dtype: str) -> int:
    """How many codes an integer has."""
    return 2 ** BITS[wire_dtype]


def scale(low: Float[Array, "c"], high: Float[Array, "c"], wire_dtype: str) -> Scale:
    """The codes of a range, ``float32[2, c]``: ``low`` is the first, ``high`` the last."""
    codes = levels(wire_dtype)
    step = jnp.maximum(high - low, np.finfo(np.float32).tiny * codes) / (codes - 1)
    return jnp.stack([low, step]).astype(jnp.float32)


def encode(
    x: Float[Array, "b ... c"], wire_dtype: str, scale: Scale | None = None
) -> Shaped[Array, "b ..."]:
    """Converts what is computed to what travels; integers need a ``scale``, and clip."""
    return pack(codes(x, wire_dtype, scale), wire_dtype)


def decode(
    y: Shaped[Array, "b ..."],
    wire_dtype: str,
    like: jax.ShapeDtypeStruct | Array,
    scale: Scale | None = None,
) -> Float[Array, "b ... c"]:
    """Converts what travelled back to the shape and dtype computed in.

    >>> x, high = jnp.array([[7.3, 12.0, 999.0]]), jnp.array([255.0, 255.0, 255.0])
    >>> s = scale(0 * high, high, "int8")
    >>> decode(encode(x, "int8", s), "int8", x, s).tolist()
    [[7.0, 12.0, 255.0]]
    >>> s = scale(0 * high, high / 17, "int4")
    >>> encode(x, "int4", s).shape, decode(encode(x, "int4", s), "int4", x, s).tolist()
    ((1, 2), [[7.0, 12.0, 15.0]])
    """
    return values(unpack(y, wire_dtype, like.shape), wire_dtype, like.dtype, scale)


def codes(
    x: Float[Array, "b ... c"], wire_dtype: str, scale: Scale | None = None
) -> Shaped[Array, "b ... c"]:
    """What stands for each number on the wire; one of int4 has a byte to itself until packed."""
    if scale is None:
        x = x.astype(wire_dtype)
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if wire_dtype == "bfloat16" else x
    code = jnp.clip(jnp.round((x - scale[0]) / scale[1]), 0, levels(wire_dtype) - 1)
    return (code - 128).astype(jnp.int8) if wire_dtype == "int8" else code.astype(jnp.uint8)


def values(
    code: Shaped[Array, "b ... c"],
    wire_dtype: str,
    dtype: jax.typing.DTypeLike,
    scale: Scale | None = None,
) -> Float[Array, "b ... c"]:
    """The numbers that ``code`` stands for."""
    if scale is None:
        if wire_dtype == "bfloat16":
            code = jax.lax.bitcast_convert_type(code, jnp.bfloat16)
        return code.astype(dtype)
    number = code.astype(jnp.float32) + 128 if wire_dtype == "int8" else code
    return (number * scale[1] + scale[0]).astype(dtype)


def arrived(
    x: Float[Array, "b ... c"], wire_dtype: str | None, scale: Scale | None = None
) -> Float[Array, "b ... c"]:
    """What is read of ``x`` when it is sent; None sends what is computed."""
    if wire_dtype is None:
        return x
    return values(codes(x, wire_dtype, scale), wire_dtype, x.dtype, scale)


def rounded(
    x: Float[Array, "b ... c"], wire_dtype: str, scale: Scale | None
) -> Float[Array, "b ... c"]:
    """What has :func:`arrived` when ``x`` is sent; the gradient is that of clipping alone.

    Rounding has no slope of use: the gradient passes straight through (Bengio et al. 2013).
    """
    kept = x
    if scale is not None:
        kept = jnp.clip(x, scale[0], scale[0] + (levels(wire_dtype) - 1) * scale[1])
    return kept + jax.lax.stop_gradient(arrived(x, wire_dtype, scale) - kept)


def pack(code: Shaped[Array, "b ..."], wire_dtype: str) -> Shaped[Array, "b ..."]:
    """Two codes of int4 in a byte: half of an example in the lower bits, the other in the upper.

    Halves along an axis, for XLA:CPU divides for each number of a map that is read as one row.
    """
    if wire_dtype != "int4":
        return code
    axis = _even_axis(code.shape)
    if axis is None:
        code, axis = jnp.pad(code.reshape(len(code), -1), ((0, 0), (0, 1))), 1
    lower, upper = jnp.split(code, 2, axis)
    return lower | upper << 4


def unpack(
    y: Shaped[Array, "b ..."], wire_dtype: str, shape: tuple[int, ...]
) -> Shaped[Array, "b ..."]:
    """The inverse of :func:`pack`, for codes of a shape."""
    if wire_dtype != "int4":
        return y
    axis = _even_axis(shape)
    if axis is None:
        return jnp.concatenate([y & 15, y >> 4], 1)[:, :-1].reshape(shape)
    return jnp.concatenate([y & 15, y >> 4], axis)


def _even_axis(shape: tuple[int, ...]) -> int | None:
    """The last axis of an example that has two halves."""
    return next((i for i in range(len(shape) - 1, 0, -1) if shape[i] % 2 == 0), None)
