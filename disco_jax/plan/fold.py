"""Batch normalisation folded into the layer before it: one pass less over every activation."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.interpreters import partial_eval
from jaxtyping import Array, Float

from disco_jax.layers import BatchNorm
from disco_jax.readable import note, recording
from disco_jax.trace import Images, modules, replace


class Folded(nnx.Module):
    """Where a batch normalisation was.

    Attributes:
      into: path of the layer that does its work.
    """

    def __init__(self, into: str):
        self.into = into

    def __call__(self, x: Float[Array, "b ... c"], **_: Any) -> Float[Array, "b ... c"]:
        return x


class _Blank(nnx.Module):
    """Stands for a normalisation that could be folded: notes what it is given, uses none of it."""

    def __init__(self, norm: BatchNorm):
        self.norm = norm

    def __call__(self, x: Array, **given: Any) -> Array:
        if given.get("use_running_average") is False or given.get("mask") is not None:
            return self.norm(x, **given)
        y = jax.eval_shape(self.norm, x)
        if y.dtype != x.dtype or self.norm.axis != -1:
            return self.norm(x)
        note(self, x)
        return jnp.zeros(y.shape, y.dtype)


def fold_norms(model: nnx.Module, images: Images) -> None:
    """Folds every batch normalisation that can be into the layer that feeds it, in place.

    ``scale · (W∗x + b - mean) / √(var + ε) + bias`` is the layer with the kernel
    ``W · scale / √(var + ε)`` and another bias. That can be where all that the layer computes goes
    to one normalisation and nowhere else.
    """
    pairs = foldable(model, images)
    found: dict[str, Any] = dict(modules(model))
    layers = [found[layer] for layer in pairs.values()]
    numbers = [
        (
            layer.kernel[...],
            None if layer.bias is None else layer.bias[...],
            _statistics(found[norm]),
        )
        for norm, layer in zip(pairs, layers, strict=True)
    ]
    fold = jax.jit(  # one program, not several for each shape
        lambda numbers: [_fold(*n) for n in numbers],
        out_shardings=[(kernel.sharding, shift.sharding) for kernel, _, (_, shift) in numbers],
    )
    replace_norms(model, pairs)
    for layer, (kernel, bias) in zip(layers, fold(numbers), strict=True):
        layer.kernel.set_value(kernel)
        layer.bias.set_value(bias)


def foldable(model: nnx.Module, images: Images) -> dict[str, str]:
    """The normalisations that can be folded, each with the layer that feeds it.

    Found on shapes alone: with normalisations that ignore their input, the weights of a layer that
    feeds nothing else have no influence on the result. Layers that share weights keep them.
    """
    shared = _sharing(model)
    model = nnx.clone(model, variables=False)
    model.eval()
    replace(model, {id(m): _Blank(m) for _, m in modules(model) if isinstance(m, BatchNorm)})
    graphdef, state = nnx.split(model)
    names = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    pairs: dict[str, str] = {}

    def call(leaves: list[Array], images: Array) -> Array:
        variables = zip(nnx.to_flat_state(state), leaves, strict=True)
        merged = nnx.merge(
            graphdef, nnx.from_flat_state((path, v.replace(leaf)) for (path, v), leaf in variables)
        )
        with recording() as events:
            result = merged(images)
        pairs.update(_pairs(merged, events))
        return result

    program = jax.make_jaxpr(call)([v.get_value() for _, v in nnx.to_flat_state(state)], images)
    _, used = partial_eval.dce_jaxpr(program.jaxpr, True)
    needed = {name for name, use in zip(names, used, strict=False) if use}
    needed |= {f"{layer}.kernel" for layer in shared}
    return {norm: layer for norm, layer in pairs.items() if f"{layer}.kernel" not in needed}


def _sharing(model: nnx.Module) -> list[str]:
    """Layers whose kernel or bias is another layer's too."""
    weights = {}
    for path, module in modules(model):
        own = (vars(module).get(name) for name in ("kernel", "bias"))
        weights[path] = [id(weight) for weight in own if weight is not None]
    owners = Counter(itertools.chain.from_iterable(weights.values()))
    return [path for path, own in weights.items() if any(owners[w] > 1 for w in own)]


def _pairs(model: nnx.Module, events: list[tuple[Any, Any]]) -> dict[str, str]:
    """Each normalisation that is always given what one layer has computed, with that layer."""
    paths = {id(module): path for path, module in modules(model)}
    made = {id(value): paths[id(m)] for m, value in events if hasattr(m, "kernel")}
    given: dict[str, set[str | None]] = {}
    for module, value in events:
        if isinstance(module, _Blank):
            given.setdefault(paths[id(module)], set()).add(made.get(id(value)))
    one = {norm: layers.pop() for norm, layers in given.items() if len(layers) == 1}
    fed = Counter(one.values())
    return {norm: layer for norm, layer in one.items() if layer is not None and fed[layer] == 1}


def replace_norms(model: nnx.Module, pairs: Mapping[str, str]) -> None:
    """Takes the normalisations out, in place; each layer that does their work has a bias then."""
    found: dict[str, Any] = dict(modules(model))
    for norm, layer in pairs.items():
        if found[layer].bias is None:
            mean = found[norm].mean.get_value()
            found[layer].bias = nnx.Param(
                mean if isinstance(mean, jax.ShapeDtypeStruct) else 0 * mean
            )
    replace(model, {id(found[norm]): Folded(layer) for norm, layer in pairs.items()})


def folded(model: nnx.Module) -> dict[str, str]:
    """What :func:`replace_norms` took out of a model."""
    return {path: module.into for path, module in modules(model) if isinstance(module, Folded)}


def _statistics(norm: BatchNorm) -> tuple[Array, Array]:
    """Factor and shift that the normalisation multiplies by and adds."""
    factor = lax.rsqrt(norm.var[...] + norm.epsilon)
    factor = factor if norm.scale is None else factor * norm.scale[...]
    shift = -norm.mean[...] * factor
    return factor, shift if norm.bias is None else shift + norm.bias[...]


def _fold(kernel: Array, bias: Array | None, norm: tuple[Array, Array]) -> tuple[Array, Array]:
    factor, shift = norm
    bias = shift if bias is None else bias * factor + shift
    return (kernel * factor).astype(kernel.dtype), bias.astype(kernel.dtype)
