"""This library's layers for models in Flax Linen.

They go into ``@nn.compact`` like Linen's own and keep their masks in the collection ``"Mask"``. The
optimiser of ``sparsify.sparse_exchange`` finds them in ``variables["params"]`` as it does in a
model of NNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from flax import nnx, traverse_util

from disco_jax import layers
from disco_jax.errors import require
from disco_jax.sparsify.transform import find_masks

DiscoConv = partial(nnx.bridge.to_linen, layers.Conv)
DiscoDense = partial(nnx.bridge.to_linen, layers.Dense)
DiscoBatchNorm = partial(nnx.bridge.to_linen, layers.BatchNorm)
DiscoGroupNorm = partial(nnx.bridge.to_linen, layers.GroupNorm)
DiscoLayerNorm = partial(nnx.bridge.to_linen, layers.LayerNorm)


def apply_masks(masks: Mapping[str, Any], state: Any) -> dict[str, Any]:
    """The collection ``variables["Mask"]`` with the masks of an optimiser state.

    Args:
      masks: the collection.
      state: an optimiser state with that of ``sparsify.sparse_exchange`` anywhere in its tree.

    Raises:
      DiscoError: if the state has a mask that no layer of the model has.
    """
    chosen = find_masks(state)
    known = traverse_util.flatten_dict(masks, sep=".")
    paths = {name.removesuffix(".mask"): name for name in known}
    unknown = sorted(set(chosen) - set(paths))
    require(
        not unknown,
        f"`state` has a mask for {', '.join(map(repr, unknown))}, but the model's masks are for "
        f"{', '.join(map(repr, sorted(paths)))}; pass the state of this model's optimiser",
    )
    boxed = {
        paths[path]: jax.tree.map(lambda _, mask=mask: mask, known[paths[path]])
        for path, mask in chosen.items()
    }
    return traverse_util.unflatten_dict(known | boxed, sep=".")
