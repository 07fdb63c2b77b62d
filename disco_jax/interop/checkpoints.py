"""Checkpoints of torchvision, timm and Hugging Face, as numbers for our models."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Shaped
from safetensors import SafetensorError
from safetensors.numpy import load_file

from disco_jax.errors import DiscoError, require
from disco_jax.interop.names import FAMILIES, LEAVES, UNUSED

Tensors = dict[str, Shaped[np.ndarray, "..."]]
Names = dict[str, str]  # our variable -> what a file calls it


def read(path: Path | str) -> Tensors:
    """The tensors of a ``.safetensors`` file, of torch's ``.pth``, ``.pt``, ``.bin``, or a pickle.

    Of torch's files only tensors are read, never code (``weights_only``); torch is needed for it.
    Of pickles (``.ckpt``, ``.pkl``: a nested dictionary of Flax parameters) only NumPy arrays are.

    Raises:
      DiscoError: if the file cannot be read, or torch is missing.
    """
    if Path(path).suffix in (".ckpt", ".pkl"):
        return _read_flax(path)
    if Path(path).suffix in (".pth", ".pt", ".bin"):
        return _read_torch(path)
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise DiscoError(
            f"`weights` (={path}) cannot be read ({error}); pass a .safetensors file, or a .pth "
            "file of torch"
        ) from None


def _read_torch(path: Path | str) -> Tensors:
    try:
        import torch
    except ImportError:
        raise DiscoError(
            f"`weights` (={path}) is a file of torch, which is not installed; pip install torch, "
            "or convert the file to .safetensors"
        ) from None
    try:
        found = torch.load(str(path), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its unpickler does
        reason = str(error).splitlines()[0]
        raise DiscoError(
            f"`weights` (={path}) cannot be read ({reason}); pass a file with a state dict"
        ) from None
    for key in ("state_dict", "model"):  # as training scripts wrap it
        found = found.get(key, found) if isinstance(found, dict) else found
    tensors = isinstance(found, dict) and all(hasattr(v, "numpy") for v in found.values())
    require(
        tensors, f"`weights` (={path}) holds no state dict; save one with torch.save(state_dict)"
    )
    return {name: tensor.float().numpy() for name, tensor in found.items()}


class _Arrays(pickle.Unpickler):
    """Makes NumPy arrays and nothing else."""

    known = (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_flax(path: Path | str) -> Tensors:
    """Flax's parameters under torch's names for weights, and in torch's layout."""
    try:
        with Path(path).open("rb") as file:
            found = traverse_util.flatten_dict(_Arrays(file).load(), sep=".")
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, AssertionError) as error:
        raise DiscoError(
            f"`weights` (={path}) cannot be read ({error}); pass a pickle of nested dictionaries "
            "of NumPy arrays"
        ) from None
    tensors = {}
    for name, value in found.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "kernel":
            tensors[f"{stem}.weight"] = np.moveaxis(np.asarray(value), (-1, -2), (0, 1))
        else:
            tensors[name] = np.asarray(value)
    return tensors


def translate(model: nnx.Module, tensors: Tensors, ours: Iterable[str]) -> tuple[Tensors, Names]:
    """A checkpoint's tensors under our names and in our layout, as far as it has them.

    Args:
      model: the model that they are for.
      tensors: what the file holds.
      ours: names of the variables wanted.

    Returns:
      What was found, and what the family that the file is of calls each variable.
    """
    ours, families = list(ours), FAMILIES.get(type(model).__name__, {})
    names = max(
        (_names(ours, rules, model) for rules in families.values()),
        key=lambda names: sum(_parts(name).tensors[0] in tensors for name in names.values()),
        default={},
    )
    values = {name: _value(theirs, tensors) for name, theirs in names.items()}
    return {n: _layout(value, n) for n, value in values.items() if value is not None}, names


def unused(tensors: Tensors, names: Names) -> list[str]:
    """Tensors of the file that no variable of ours asks for."""
    asked = {tensor for name in names.values() for tensor in _parts(name).tensors}
    return sorted(t for t in tensors if t not in asked and not re.search(UNUSED, t))


def _names(ours: list[str], rules: Mapping[str, str], model: nnx.Module) -> Names:
    """The names of a family for the variables that it has."""
    found = {}
    for name in ours:
        module, _, leaf = name.rpartition(".")
        whole, part = _match(name, rules, model), _match(module, rules, model)
        if whole is not None:
            found[name] = whole
        elif part is not None and leaf in LEAVES:
            stem, suffix = re.fullmatch(r"([^[<]*)(.*)", part).groups()  # type: ignore[union-attr]
            found[name] = stem + "." * (not stem.endswith("_")) + LEAVES[leaf] + suffix
    return found


def _match(name: str, rules: Mapping[str, str], model: nnx.Module) -> str | None:
    for ours, theirs in rules.items():
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(ours))
        match = re.fullmatch(pattern, name)
        if match:
            return theirs.format(
                **_fields({k: int(v) for k, v in match.groupdict().items()}, model)
            )
    return None


def _fields(numbers: dict[str, int], model: Any) -> dict[str, int]:
    fields = numbers | {name + "0": number - 1 for name, number in numbers.items()}
    fields |= {name + "1": number + 1 for name, number in numbers.items()}
    if "block" in numbers and hasattr(model, "depths"):
        starts = [0, *itertools.accumulate(model.depths)]
        stage = max(s for s, start in enumerate(starts) if start <= numbers["block"])
        fields |= {"stage": stage, "stage1": stage + 1, "i": numbers["block"] - starts[stage]}
    return fields


class _Parts(NamedTuple):
    """The tensors a name stands for, which of how many parts on what axis, shape behind axis 0."""

    tensors: list[str]
    part: int = 0
    of: int = 1
    axis: int = 0
    shape: tuple[int, ...] = ()


def _parts(theirs: str) -> _Parts:
    """Reads a name of ``names.py``.

    >>> _parts("a+b").tensors, _parts("qkv.weight[1/3]")[:3], _parts("fc<-1x7x7>").shape
    (['a', 'b'], (['qkv.weight'], 1, 3), (-1, 7, 7))
    """
    if match := re.fullmatch(r"(.*)\[(:?)(\d+)/(\d+)\]", theirs):
        return _Parts([match[1]], int(match[3]), int(match[4]), axis=len(match[2]))
    if match := re.fullmatch(r"(.*)<(.*)>", theirs):
        return _Parts([match[1]], shape=tuple(map(int, match[2].split("x"))))
    return _Parts(theirs.split("+"))


def _value(theirs: str, tensors: Tensors) -> Shaped[np.ndarray, "..."] | None:
    names, part, of, axis, shape = _parts(theirs)
    if not all(name in tensors for name in names):
        return None
    value = np.concatenate([tensors[n] for n in names], 1) if len(names) > 1 else tensors[names[0]]
    if shape and value.ndim == 2:
        return value.reshape(len(value), *shape)
    return np.split(value, of, axis)[part] if value.shape[axis] % of == 0 else value


def _layout(value: Shaped[np.ndarray, "..."], name: str) -> Shaped[np.ndarray, "..."]:
    """Kernels from ``[out, in, *window]`` to ``[*window, in, out]``."""
    if not name.endswith(".kernel"):
        return value
    return np.transpose(value, (*range(2, value.ndim), 1, 0))
