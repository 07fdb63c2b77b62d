"""Which kernels read which exchange, as an optimiser sees it: by name, in a tree of parameters."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.bridge import NNXMeta
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.layers.weights import OWN, UNNAMED
from disco_jax.mesh import NodeMesh
from disco_jax.sparsify.scores import SCORES

Kernels = dict[str, list[Array]]
Scores = dict[str, Float[Array, "node channel"]]
Readers = tuple[tuple[str, str, int], ...]


def kernel_readers(params: Any) -> tuple[Readers, NodeMesh | None]:
    """(parameter, exchange, features) of kernels whose metadata names them, and the mesh.

    Raises:
      DiscoError: if a kernel reads an exchange that has no name yet.
    """
    named = [(name, m) for name, m in metadata(params) if "exchange" in m]
    for name, m in named:
        require(
            m["exchange"] != UNNAMED,
            f"`{name}` reads an exchange that has no name yet; call "
            "disco_jax.name_exchanges(model) before the optimiser is made",
        )
    mesh = named[0][1]["node_mesh"] if named else None
    return tuple((name, _exchange(name, m["exchange"]), m["features"]) for name, m in named), mesh


def _exchange(kernel: str, exchange: str) -> str:
    return kernel.removesuffix("kernel") + "exchange" if exchange == OWN else exchange


def metadata(params: Any) -> list[tuple[str, dict[str, Any]]]:
    """What each parameter of an NNX model, or of NNX layers in a Linen model, says of itself."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=_is_variable)
    return [
        (_name(path), v.metadata if isinstance(v, NNXMeta) else v.get_metadata())
        for path, v in leaves
        if _is_variable(v)
    ]


def group_kernels(params: Any, readers: Readers) -> Kernels:
    """The kernels that read each exchange."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=_is_variable)
    arrays = {_name(path): _value(v) for path, v in leaves}
    groups: Kernels = {}
    for name, exchange, _ in readers:
        groups.setdefault(exchange, []).append(arrays[name])
    return groups


def map_kernels(
    fn: Callable[[Array, str], Array],
    params: Any,
    readers: Readers,
    others: Callable[[Array], Array] = lambda leaf: leaf,
) -> Any:
    """Applies ``fn(kernel, exchange)`` to the kernels that read an exchange, in their tree."""
    exchange = {name: path for name, path, _ in readers}
    leaves, tree = jax.tree.flatten_with_path(params)
    names = (_name(path).removesuffix(".value") for path, _ in leaves)
    new = [
        fn(leaf, exchange[name]) if name in exchange else others(leaf)
        for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, new)


def score_groups(
    score: str, kernels: Kernels, mesh: NodeMesh, *, seed: int = 0, **given: Mapping[str, Any]
) -> Scores:
    """Scores of all exchanges; ``given`` has for each exchange what the score needs."""

    def one(path: str, group: list[Array]) -> Array:
        inputs: dict[str, Any] = {name: values[path] for name, values in given.items()}
        if score == "random":  # exchanges of one shape differ
            inputs["seed"] = seed + zlib.crc32(path.encode()) % 2**20
        return SCORES[score](group, mesh.nodes, **inputs)

    return {path: one(path, group) for path, group in kernels.items()}


def bury_dead(scores: Scores, readers: Readers) -> Scores:
    """Dead channels are worth ``-inf``: no budget buys them."""
    features = {exchange: count for _, exchange, count in readers}
    return {
        path: jnp.where(np.arange(s.shape[1]) < features[path], s, -jnp.inf)
        for path, s in scores.items()
    }


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable | NNXMeta)


def _value(x: Any) -> Array:
    if isinstance(x, NNXMeta):
        return x.value
    return x[...] if isinstance(x, nnx.Variable) else x


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
