"""What is lost of what an exchange's readers read, by masks and by rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from disco_jax import wire
from disco_jax.sparsify.calibrate import observe
from disco_jax.sparsify.quantise import wire_scales
from disco_jax.trace import Images, exchanges, readers


@dataclasses.dataclass(frozen=True)
class Worth:
    """What masks leave of the energy that an exchange's readers read.

    Attributes:
      columns: share of each column, the best first.
      noise: of each wire dtype, what rounding makes of a unit of energy.
    """

    columns: np.ndarray
    noise: Mapping[str, float]

    @property
    def own(self) -> float:
        """Share of own channels."""
        return max(1e-9, 1.0 - float(self.columns.sum()))

    def loss(self, counts: np.ndarray, dtype: str, *, rounds_own: bool) -> np.ndarray:
        """Of so many columns."""
        remote = np.concatenate([[0.0], np.cumsum(self.columns)])[counts]
        clean = 1 - self.noise[dtype]
        return -np.log(np.minimum(1.0, self.own * (clean if rounds_own else 1) + remote * clean))

    def uniform_loss(self, density: float) -> float:
        """Of one density in the finest wire dtype, split by channels."""
        count = np.array([round(density * len(self.columns))])
        finest = min(self.noise, key=self.noise.__getitem__)
        return float(self.loss(count, finest, rounds_own=False)[0])


def worths(model: nnx.Module, images: Images, dtypes: Sequence[str]) -> dict[str, Worth]:
    """Of every masked exchange; ``images`` as for ``plan_splits``."""
    noise = rounding_noise(model, images, dtypes)
    found = readers(model)
    worth = {}
    for path, exchange in exchanges(model).items():
        kernels = [np.asarray(layer.kernel[...]) for _, layer in found[path]]
        columns = column_shares(kernels, exchange.mesh.nodes)
        worth[path] = Worth(columns, noise[path])
    return worth


def column_shares(
    kernels: Sequence[Float[np.ndarray, "... c_in c_out"]], nodes: int
) -> Float[np.ndarray, "column"]:
    """Shares of ``Σ w²`` of the columns that may be sent, the best first.

    A column gives every node its best channel, of those left, of the node some places before.

    >>> column_shares([np.array([[1.0, 2.0], [3.0, 4.0]])], 2).round(3).tolist()
    [0.433]
    """
    squares = (np.square(k).reshape(-1, *k.shape[-2:]).sum(0) for k in kernels)
    each = [s.reshape(len(s), nodes, -1).sum(-1).T for s in squares]  # [node, channel]
    energy = np.sum(each, 0).reshape(nodes, nodes, -1)  # [reader, owner, channel]
    ranked, node = np.sort(energy)[..., ::-1], np.arange(nodes)
    hops = [ranked[node, (node - offset) % nodes].sum(0) for offset in range(1, nodes)]
    columns = np.concatenate([np.zeros(0), *hops])
    return np.sort(columns)[::-1] / max(energy.sum(), np.finfo(energy.dtype).tiny)


def rounding_noise(
    model: nnx.Module, images: Images, dtypes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Energy of what rounding to each wire dtype changes as a share of what an exchange is given.

    By exchange and wire dtype.
    """
    paths = list(exchanges(model))
    if isinstance(images, jax.ShapeDtypeStruct):
        return {
            path: dict(zip(dtypes, map(_expected_noise, dtypes), strict=True)) for path in paths
        }
    found = {dtype: wire_scales(model, images, dict.fromkeys(paths, dtype)) for dtype in dtypes}
    scales = jax.tree.map(jnp.asarray, found)

    def noise_of(inputs: dict[str, list[Array]]) -> dict[str, dict[str, Array]]:
        return {
            path: {d: share(xs, d, scales[d].get(path)) for d in dtypes}
            for path, xs in inputs.items()
        }

    def share(xs: list[Array], dtype: str, scale: Array | None) -> Array:
        x = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in xs])
        change = wire.rounded(x, dtype, scale) - x
        return jnp.sum(change**2) / jnp.maximum(jnp.sum(x**2), 1e-30)

    return jax.tree.map(float, observe(model, noise_of)(model, images))


def _expected_noise(dtype: str) -> float:
    """Of the positive halves of normal distributions, in steps of 6 σ / (2^bits - 1)."""
    levels = 2 ** wire.BITS[dtype] - 1  # errors are uniform within a step, and E x² = σ²
    return (6 / levels) ** 2 / 12 if wire.calibrated(dtype) else 0.0
