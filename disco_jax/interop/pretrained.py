"""Weights in a file, our own or others', for the same model on any number of nodes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Shaped
from safetensors.numpy import save_file

from disco_jax.errors import require
from disco_jax.interop import checkpoints
from disco_jax.interop.checkpoints import Names, Tensors
from disco_jax.interop.names import BACKBONES
from disco_jax.trace import modules


def save(model: nnx.Module, path: Path | str) -> None:
    """Writes parameters and running statistics by their paths."""
    arrays = {name: np.asarray(v[...]) for name, v in _variables(model).items()}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, str(path))


def load(model: nnx.Module, path: Path | str, *, skip: Sequence[str] = ()) -> None:
    """Reads weights from a file, in place; the model may have any number of nodes.

    The file is one that :func:`save` wrote, or a checkpoint of the same architecture from
    torchvision (ResNet, ViT, VGG-16, SSD300, DeepLabV3), timm (ResNet, ViT, DeiT, ConvNeXt) or
    Hugging Face's ``transformers`` (the same as timm), as ``.safetensors`` or, where torch is
    installed, ``.pth``; which of them it is, its names tell. Check that the model has the
    checkpoint's ``epsilon`` (Hugging Face's ViT and DeiT: 1e-12), ``image_size`` and
    ``num_classes``.

    Args:
      model: a masked model.
      path: the file.
      skip: patterns of variables that stay as they are, such as ``("^head",)`` for a new head.

    Raises:
      DiscoError: if the file cannot be read, or tensors are missing, left over or misshapen; the
        message lists all of them.
    """
    found = _variables(model)
    wanted = {n: v for n, v in found.items() if not any(re.search(s, n) for s in skip)}
    _load(model, path, wanted, whole=True)


def load_backbone(model: nnx.Module, path: Path | str) -> None:
    """Reads a classifier's weights into the backbone of a detector or a segmentation, in place.

    A ResNet's into a ``Backbone``, the convolutions of VGG-16 into SSD300's trunk; the file is one
    that :func:`load` reads, and its other weights are left out.

    Raises:
      DiscoError: if the model has no backbone, the file cannot be read, or tensors are missing or
        misshapen; the message lists all of them.
    """
    parts = [m for _, m in modules(model) if type(m).__name__ in BACKBONES]
    require(
        len(parts) == 1,
        f"`model` ({type(model).__name__}) has no backbone that takes a classifier's weights "
        f"({', '.join(BACKBONES)}); load those of the whole model",
    )
    pattern = BACKBONES[type(parts[0]).__name__]
    wanted = {n: v for n, v in _variables(parts[0]).items() if re.search(pattern, n)}
    _load(parts[0], path, wanted, whole=False)


def _load(
    model: nnx.Module, path: Path | str, wanted: dict[str, nnx.Variable], *, whole: bool
) -> None:
    """Sets the variables ``wanted``; with ``whole`` the file may hold no others."""
    tensors, extra, theirs = _ours(model, checkpoints.read(path), _variables(model))
    missing = [theirs.get(name, name) for name in wanted if name not in tensors]
    least = _least_shapes(model)
    fitted = {n: _fit(tensors[n], v.shape, least[n]) for n, v in wanted.items() if n in tensors}
    odd = [
        f"{theirs.get(name, name)} {tensors[name].shape} instead of {wanted[name].shape}"
        for name, value in fitted.items()
        if value is None
    ]
    kinds = {"missing": missing, "of another shape": odd}
    if whole:
        kinds["not in the model"] = extra
    require(
        not any(kinds.values()),
        f"`weights` (={path}) are not those of the model: "
        + "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
        + "; load the weights of the same model, or skip= what is to stay as it is",
    )
    for name, value in fitted.items():
        variable = wanted[name]
        placed = jax.device_put(np.asarray(value, variable.dtype), variable[...].sharding)
        variable.set_value(placed)


def _ours(
    model: nnx.Module, tensors: Tensors, names: Collection[str]
) -> tuple[Tensors, list[str], Names]:
    """Tensors under our names, those that are left over, and what the file calls a variable."""
    translated, theirs = checkpoints.translate(model, tensors, names)
    if len(translated) <= len(tensors.keys() & set(names)):
        return tensors, sorted(tensors.keys() - set(names)), {}
    return translated, checkpoints.unused(tensors, theirs), theirs


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in state}


def _least_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all variables without dead channels, as far as their modules tell."""
    found: dict[str, Any] = dict(modules(model))
    nodes = max((m.mesh.nodes for m in found.values() if hasattr(m, "mesh")), default=1)
    least = {}
    for name, variable in _variables(model).items():
        path, _, leaf = name.rpartition(".")
        layer, (*before, last) = found[path], variable.shape
        if hasattr(layer, "kernel"):
            last = layer.out_features
            if leaf == "kernel" and getattr(layer, "feature_group_count", 1) == 1:
                before[-1] = layer.in_features
        else:
            last = max(1, last - nodes + 1)
        least[name] = (*before, last)
    return least


def _fit(
    value: Shaped[np.ndarray, "..."], shape: tuple[int, ...], least: tuple[int, ...]
) -> Shaped[np.ndarray, "..."] | None:
    """Appends dead channels, which are zero, or drops them; None if that does not do it."""
    if value.ndim != len(shape) or any(np.less(value.shape, least)):
        return None
    cut = value[tuple(map(slice, shape))]
    missing = [(0, target - had) for target, had in zip(shape, cut.shape, strict=True)]
    return np.pad(cut, missing) if np.count_nonzero(cut) == np.count_nonzero(value) else None
