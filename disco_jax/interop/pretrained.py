"""Weights in a safetensors file, for the same model on any number of nodes."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from disco_jax.errors import DiscoError, require
from disco_jax.trace import modules


def save(model: nnx.Module, path: Path | str) -> None:
    """Writes parameters and running statistics by their paths."""
    arrays = {name: np.asarray(v[...]) for name, v in _variables(model).items()}
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, str(path))


def load(model: nnx.Module, path: Path | str) -> None:
    """Reads what :func:`save` wrote, in place; the model may have other nodes than the one saved.

    Raises:
      DiscoError: if the file cannot be read, or names or shapes are not the model's.
    """
    try:
        arrays = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise DiscoError(
            f"`weights` (={path}) cannot be read ({error}); pass a file written by "
            "interop.pretrained.save"
        ) from None
    found = _variables(model)
    odd = sorted(set(found) ^ set(arrays))
    require(
        not odd,
        f"`weights` (={path}) and the model differ in {odd[:1]} and {max(len(odd) - 1, 0)} more "
        "names; load the weights of the same model",
    )
    nodes = max((m.mesh.nodes for _, m in modules(model) if hasattr(m, "mesh")), default=1)
    fitted = {name: _fit(arrays[name], v.shape, name, nodes) for name, v in found.items()}
    for name, variable in found.items():
        value = fitted[name].astype(variable.dtype)
        variable.set_value(jax.device_put(value, variable[...].sharding))


def _variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return {".".join(map(str, path)): variable for path, variable in state}


def _fit(
    value: Shaped[np.ndarray, "..."], shape: tuple[int, ...], name: str, nodes: int
) -> Shaped[np.ndarray, "..."]:
    """Appends dead channels, which are zero, or drops them."""
    fits = value.ndim == len(shape)
    if fits:
        cut = value[tuple(map(slice, shape))]
        missing = [(0, target - had) for target, had in zip(shape, cut.shape, strict=True)]
        fits = np.count_nonzero(cut) == np.count_nonzero(value)
        fits &= all(dead < nodes for _, dead in missing)
    require(
        fits,
        f"`{name}` has shape {value.shape}, but the model's is {shape}; load the weights of the "
        "same model",
    )
    return np.pad(cut, missing)
