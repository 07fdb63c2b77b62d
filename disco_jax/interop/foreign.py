"""Flax's layers as ours: what each mixes, and the same weights in the order that the nodes need."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax
from jaxtyping import Array, Shaped

from disco_jax import layers
from disco_jax.exchange import Exchange, Local, Reader, Replicated
from disco_jax.interop.flow import Order
from disco_jax.interop.layout import Layout
from disco_jax.mesh import NODE, NodeMesh

_WEIGHTS = ("use_bias", "dtype", "param_dtype", "precision")


@dataclasses.dataclass(frozen=True)
class Dense:
    """``nnx.Linear``, and ``nnx.LinearGeneral`` over the last ``reads`` axes of its input."""

    original: Any
    features: int
    dims: tuple[int, ...]
    reads: int = 1
    groups: int = 1

    def fits(self, layout: Layout | None, ndim: int) -> bool:
        return ndim > self.reads and (layout is None or layout.axis >= ndim - self.reads)

    def follows(self, layout: Layout) -> Order | None:
        return None

    def build(self, read: Reader, inputs: Layout | None, outputs: Order) -> Any:
        layer = layers.Dense(
            self.features,
            int(np.prod(self.dims)),
            exchange=read,
            pad=True,
            unit=Layout(0, outputs).unit() or 1,
            kernel_init=nnx.initializers.zeros,
            rngs=nnx.Rngs(0),
            **_settings(self.original, *_WEIGHTS),
        )
        kernel = _numbers(self.original.kernel).reshape(self.features, -1)
        return _filled(layer, kernel, self.original.bias, inputs, outputs)


@dataclasses.dataclass(frozen=True)
class Conv:
    """``nnx.Conv``; a grouped one keeps whole groups on each node."""

    original: Any
    features: int
    dims: tuple[int, ...]
    rank: int
    groups: int
    reads: int = 1

    def fits(self, layout: Layout | None, ndim: int) -> bool:
        if ndim != self.rank + 2:
            return False
        if self.groups == 1:
            return layout is None or layout.axis == ndim - 1
        return layout is not None and layout.axis == ndim - 1 and self._whole_groups(layout)

    def _whole_groups(self, layout: Layout) -> bool:
        if layout.dead:
            depthwise = self.groups == self.features == self.dims[0]
            return depthwise and layout.unit() == 1
        size = self.features // self.groups
        if layout.width % size:
            return False
        groups = layout.order.reshape(-1, size)
        first = groups[:, :1]
        return bool((first % size == 0).all() and (groups - first == np.arange(size)).all())

    def follows(self, layout: Layout) -> Order | None:
        if self.groups == 1:
            return None
        if layout.dead:
            return layout.order
        size, out = self.features // self.groups, self.dims[0] // self.groups
        groups = layout.order[:, ::size] // size
        return (groups[:, :, None] * out + np.arange(out)).reshape(layout.nodes, -1)

    def build(self, read: Reader, inputs: Layout | None, outputs: Order) -> Any:
        windows = ("kernel_size", "strides", "padding", "input_dilation", "kernel_dilation")
        layer = layers.Conv(
            self.features,
            self.dims[0],
            exchange=read,
            pad=True,
            feature_group_count=self.groups,
            kernel_init=nnx.initializers.zeros,
            rngs=nnx.Rngs(0),
            **_settings(self.original, *windows, *_WEIGHTS),
        )
        kernel = _numbers(self.original.kernel)
        order = inputs if self.groups == 1 else None
        return _filled(layer, kernel, self.original.bias, order, outputs)


@dataclasses.dataclass(frozen=True)
class Norm:
    """``nnx.BatchNorm`` and ``nnx.LayerNorm`` over the last axis."""

    original: Any
    reads: int = 1
    dims: tuple[int, ...] = ()

    def fits(self, layout: Layout | None, ndim: int) -> bool:
        if layout is None or layout.axis != ndim - 1:
            return False
        return not layout.dead or layout.unit() == 1

    def follows(self, layout: Layout) -> Order | None:
        return layout.order

    def build(self, outputs: Order, mesh: NodeMesh, **settings: Any) -> Any:
        names = ["epsilon", "use_bias", "use_scale", "dtype", "param_dtype"]
        of_batch = isinstance(self.original, nnx.BatchNorm)
        names += ["momentum", "use_running_average", "use_fast_variance"] if of_batch else []
        make: Any = layers.BatchNorm if of_batch else layers.LayerNorm
        layer = make(
            int(self.original.num_features),
            mesh=mesh,
            pad=True,
            rngs=nnx.Rngs(0),
            **_settings(self.original, *names),
            **settings,
        )
        for name in ("scale", "bias", "mean", "var"):
            ours, theirs = getattr(layer, name, None), getattr(self.original, name, None)
            if isinstance(ours, nnx.Variable) and theirs is not None:
                value = arranged(_numbers(theirs), outputs, -1)
                ours.set_value(mesh.put(value.astype(ours.dtype), NODE))
        return layer


Foreign = Dense | Conv | Norm


def foreign(module: Any) -> Foreign | None:
    """A layer of Flax's that ours can replace, or None."""
    if type(module) is nnx.Linear and _usual(module, dot_general=lax.dot_general):
        return Dense(module, int(module.in_features), (int(module.out_features),))
    if type(module) is nnx.LinearGeneral and _usual(module, dot_general=None, dot_general_cls=None):
        reads = len(module.axis)
        if module.axis == tuple(range(-reads, 0)) and not module.batch_axis:
            dims = tuple(map(int, module.out_features))
            return Dense(module, int(np.prod(module.in_features)), dims, reads)
    if type(module) is nnx.Conv and _usual(
        module, conv_general_dilated=lax.conv_general_dilated, mask=None
    ):
        return Conv(
            module,
            int(module.in_features),
            (int(module.out_features),),
            len(module.kernel_size),
            int(module.feature_group_count),
        )
    if type(module) is nnx.BatchNorm and module.axis == -1 and _usual(module, axis_name=None):
        return Norm(module)
    if type(module) is nnx.LayerNorm and _usual(module, axis_name=None):
        last = (module.reduction_axes, module.feature_axes) in ((-1, -1), ((-1,), (-1,)))
        return Norm(module) if last else None
    return None


def _usual(module: Any, **expected: Any) -> bool:
    """Whether nothing of the layer was replaced by its user, and it is not one of a stack."""
    expected |= {"promote_dtype": dtypes.promote_dtype, "preferred_element_type": None}
    if any(getattr(module, name, value) is not value for name, value in expected.items()):
        return False
    kernel, scale = getattr(module, "kernel", None), getattr(module, "scale", None)
    if kernel is not None:
        window = getattr(module, "kernel_size", ())
        ins, outs = np.size(module.in_features), np.size(module.out_features)
        return bool(kernel[...].ndim == len(window) + ins + outs)
    return scale is None or scale[...].ndim == 1


def reader(kind: Dense | Conv, inputs: Layout | None, mesh: NodeMesh) -> Reader:
    """An exchange of the channels that a layer reads."""
    if kind.groups > 1:
        return Local(kind.features, mesh=mesh, pad=True)
    if inputs is None:
        return Replicated(kind.features, mesh=mesh)
    return Exchange(kind.features, mesh=mesh, pad=True, unit=inputs.unit() or 1)


def arranged(
    value: Shaped[Array | np.ndarray, "..."], order: Order, axis: int
) -> Shaped[Array | np.ndarray, "..."]:
    """``value`` with the entries of ``axis`` in this order, zeros where it is dead."""
    slots, xp = order.ravel(), np if isinstance(value, np.ndarray) else jnp
    taken = xp.take(value, np.maximum(slots, 0), axis)
    alive = np.expand_dims(slots >= 0, [i for i in range(value.ndim) if i != axis % value.ndim])
    return xp.where(alive, taken, 0).astype(value.dtype)


def _numbers(variable: nnx.Variable) -> Any:
    """On the host, where a kernel is arranged at once; but in an abstract model there are none."""
    value = variable.get_value()
    return value if isinstance(value, jax.core.Tracer) else np.asarray(value)


def _filled(
    layer: Any, kernel: Array | np.ndarray, bias: Any, inputs: Layout | None, outputs: Order
) -> Any:
    kernel = kernel if inputs is None else arranged(kernel, inputs.order, -2)
    put = layer.mesh.put
    layer.kernel.set_value(put(arranged(kernel, outputs, -1), *[None] * (kernel.ndim - 1), NODE))
    if bias is not None:
        flat = _numbers(bias).reshape(-1)
        layer.bias.set_value(put(arranged(flat, outputs, -1), NODE))
    return layer


def _settings(module: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(module, name) for name in names}
