"""What every layer with weights needs: something to read, and weights split by output channel."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float

from disco_jax.errors import require
from disco_jax.exchange import Exchange, Local, Reader
from disco_jax.mesh import NODE, NodeMesh
from disco_jax.partition import pad_axis
from disco_jax.readable import Operation, Readable, note

OWN = "."  # the exchange of the kernel's own layer
UNNAMED = ""  # one that several layers may share, until trace.name_exchanges has named it


def reader(
    features: int,
    *,
    exchange: Reader | None,
    mesh: NodeMesh | None,
    pad: bool = False,
    groups: int = 1,
) -> Reader:
    """The exchange given to a layer, or one of the layer's own.

    Raises:
      DiscoError: if there is neither exchange nor mesh, or the exchange carries other features.
    """
    if exchange is None:
        require(
            mesh is not None,
            "`mesh` and `exchange` are both missing; pass mesh=NodeMesh(...), or the exchange of "
            "the tensor that the layer reads",
        )
        assert mesh is not None
        return (Local if groups > 1 else Exchange)(features, mesh=mesh, pad=pad)
    require(
        groups == 1 or isinstance(exchange, Local),
        f"`feature_group_count` (={groups}) needs an exchange that moves nothing, not "
        f"{type(exchange).__name__}; pass mesh=, or exchange=Local(...)",
    )
    require(
        exchange.features == features,
        f"`in_features` (={features}) must equal the features of the exchange "
        f"(={exchange.features}) that the layer reads; pass in_features={exchange.features}",
    )
    return exchange


def refuse(layer: str, keywords: dict[str, Any], *names: str) -> None:
    """Refuses Flax keywords that a split layer could only ignore."""
    for name in names:
        require(
            name not in keywords,
            f"`{name}` of flax.nnx.{layer} is not supported by the split layer; remove it",
        )


def distribute_weights(layer: Any, c_in: int, c_out: int, *, alone: bool = False) -> None:
    """Pads a Flax layer's ``kernel [..., c_in, c_out]`` and ``bias``, and places them.

    The nodes share output channels, or input channels where the layer reads ``Parts``. Rows and
    columns of dead channels are zero, and stay zero under any gradient step. With ``alone``, the
    exchange is the layer's own, and the kernel says so to optimisers.
    """
    kernel = pad_axis(pad_axis(layer.kernel[...], c_in, -2), c_out, -1)
    rows, columns = (NODE if axis == layer.exchange.split_axis else None for axis in (-2, -1))
    layer.kernel.set_value(layer.mesh.put(kernel, *[None] * (kernel.ndim - 2), rows, columns))
    if layer.bias is not None:
        layer.bias.set_value(layer.mesh.put(pad_axis(layer.bias[...], c_out, -1), columns))
    if isinstance(layer.exchange, Exchange):
        note_exchange(layer, OWN if alone else UNNAMED)


def dense_kernel(layer: Any) -> int:
    """Numbers of a layer's kernel without those of dead channels."""
    window = layer.kernel.shape[-2 - len(getattr(layer, "kernel_size", ())) : -2]
    groups = getattr(layer, "feature_group_count", 1)
    return math.prod(window) * (layer.in_features // groups) * layer.out_features


def note_exchange(layer: Any, name: str) -> None:
    """Tells those who see the kernel alone, such as an optimiser, which exchange it reads."""
    layer.kernel.set_metadata(exchange=name, node_mesh=layer.mesh, features=layer.exchange.features)


def apply_weights(
    layer: Any, inputs: Float[Array, "b ... c_in"] | Readable, op: Operation
) -> Float[Array, "b ... c_out"]:
    """Exchange (unless ``inputs`` were exchanged already), local operation, bias."""
    readable = inputs if isinstance(inputs, Readable) else layer.exchange(inputs)
    require(
        readable.source == id(layer.exchange),
        f"`inputs` of {type(layer).__name__}(in_features={layer.in_features}) come from an "
        "exchange that is not the layer's own; build the layer with exchange= that exchange",
    )
    bias = None if layer.bias is None else layer.bias[...]
    x, kernel, bias = promote_dtype((readable.values, layer.kernel[...], bias), dtype=layer.dtype)
    if layer.exchange.split_axis == -2 and readable.packed:
        kernel, bias = _parts(kernel, bias, layer.mesh.nodes)
    y = readable.replace(x).apply(op, kernel)
    y = y if bias is None else y + bias
    note(layer, y)
    return y


def _parts(
    kernel: Float[Array, "*k c_in c_out"], bias: Float[Array, "c_out"] | None, nodes: int
) -> tuple[Float[Array, "n *k c_own c_out"], Float[Array, "n*c_out"] | None]:
    """A kernel as the nodes share its input channels; the first node alone adds the bias."""
    *window, c_in, c_out = kernel.shape
    blocks = jnp.moveaxis(kernel.reshape(*window, nodes, c_in // nodes, c_out), -3, 0)
    if bias is None:
        return blocks, None
    # Not a pad, for which XLA moves data between the nodes.
    return blocks, jnp.where(jnp.arange(nodes)[:, None] == 0, bias, 0).reshape(-1)


def split_channels(
    value: Float[Array, "... c"], channels: int, mesh: NodeMesh
) -> Float[Array, "... padded"]:
    """Places a per-channel parameter beside the channels it belongs to."""
    return mesh.put(pad_axis(value, channels, -1), *[None] * (value.ndim - 1), NODE)
