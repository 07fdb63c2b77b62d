"""Training with what the wire rounds: ranges of channels, and exchanges that round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from disco_jax import wire
from disco_jax.errors import require
from disco_jax.rules import first_match
from disco_jax.sparsify.calibrate import observe
from disco_jax.trace import Images, exchanges

WireDtype = str | Sequence[tuple[str, str]] | None
SHARES = np.linspace(1.0, 0.3, 15, dtype=np.float32)  # of the full range that are tried


def quantise(model: nnx.Module, images: Images, wire_dtype: WireDtype) -> None:
    """From now on the model reads remote channels as they arrive, in place.

    What is rounded has the gradient of clipping alone, so that training goes on; ``freeze`` takes
    over wire dtypes and ranges, and the packed model computes what the masked one does (fine-tuning
    with rounding in the forward pass: Jacob et al. 2018; fixed clipping ranges: PACT, Choi et al.
    2018).

    Args:
      model: a masked model.
      images: a few hundred images, from which integers take the range of every channel.
      wire_dtype: for all exchanges, or rules ``(pattern, wire_dtype)``: the first pattern that is
        found in an exchange's path counts.

    Raises:
      DiscoError: for an unknown wire dtype, integers without images, or a rule that is not used.
    """
    dtypes = wire_dtypes(list(exchanges(model)), wire_dtype)
    scales = wire_scales(model, images, dtypes)
    for path, dtype in dtypes.items():
        exchanges(model)[path].round_to(dtype, scales.get(path))


def wire_dtypes(paths: Sequence[str], wire_dtype: WireDtype) -> dict[str, str]:
    """The wire dtype of every exchange for which there is one.

    >>> wire_dtypes(["conv", "head"], [("head", "float16")])
    {'head': 'float16'}
    """
    if wire_dtype is None:
        return {}
    rules = [("", wire_dtype)] if isinstance(wire_dtype, str) else wire_dtype
    for _, dtype in rules:
        wire.check_wire_dtype(dtype)
    return first_match(rules, paths, "wire_dtype")


def wire_scales(
    model: nnx.Module, images: Images, dtypes: Mapping[str, str]
) -> dict[str, Float[np.ndarray, "2 c"]]:
    """Lowest value and step of every channel of the exchanges that send integers.

    Of several ranges, each a share of what the channel takes on, the one whose codes have the
    smallest squared error: the fewer the codes, the more outliers are clipped.
    """
    integers = {path: dtype for path, dtype in dtypes.items() if wire.calibrated(dtype)}
    if not integers:
        return {}
    require(
        not isinstance(images, jax.ShapeDtypeStruct),
        f"`images` (=a ShapeDtypeStruct) must be images where wire_dtype={min(integers.values())!r}"
        ", which is calibrated on them; pass an array of a few hundred",
    )

    def scales(inputs: dict[str, list[Array]]) -> dict[str, Array]:
        found = {}
        for path, dtype in integers.items():
            xs = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs[path]])
            found[path] = _best_scale(xs, dtype)
        return found

    return jax.device_get(observe(model, scales)(model, images))


def _best_scale(x: Float[Array, "m c"], dtype: str) -> Float[Array, "2 c"]:
    low, high = x.min(0), x.max(0)
    middle = jnp.clip(0.0, low, high)

    def attempt(share: Array) -> tuple[Array, Array]:
        ends = middle + share * (low - middle), middle + share * (high - middle)
        scale = wire.scale(*ends, dtype)
        return scale, jnp.sum(jnp.square(wire.rounded(x, dtype, scale) - x), 0)

    scales, errors = jax.lax.map(attempt, SHARES)
    return jnp.take_along_axis(scales, errors.argmin(0)[None, None], 0)[0]
