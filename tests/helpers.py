"""What several tests need: meshes, random masks, weights carried over, relative errors."""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import disco_jax as dj
from disco_jax.partition import pad_axis
from disco_jax.readable import expand_mask
from disco_jax.trace import exchanges

NODES = (1, 2, 3, pytest.param(4, marks=pytest.mark.slow), 8)


def meshes(nodes):
    """The same nodes on devices of their own, and emulated."""
    return dj.NodeMesh(nodes, emulate=False), dj.NodeMesh(nodes, emulate=True)


def randomize(model, seed=0):
    """Replaces every parameter and statistic of a model by random numbers, where they are."""
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        value = rng.normal(size=variable.shape) / np.sqrt(max(1, np.prod(variable.shape[:-1])))
        if path[-1] in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, variable.shape)
        placed = jax.device_put(jnp.asarray(value, variable.dtype), variable[...].sharding)
        variable.set_value(placed)


def random_mask(exchange, density, seed=0):
    """Own channels and a random, uneven choice of living remote ones."""
    full = exchange.full_mask()
    chosen = np.random.default_rng(seed).random(full.shape) < density
    rows = np.random.default_rng(seed + 1).random(len(full)) < 0.8  # some nodes read nothing
    return jnp.asarray(full & chosen & rows[:, None])


def random_masks(model, density, seed=0):
    for i, exchange in enumerate(exchanges(model).values()):
        exchange.set_mask(random_mask(exchange, density, seed + i))


def carry_over(plain, model):
    """Copies a plain Flax model's variables of the same paths, dead channels appended."""
    source = dict(nnx.to_flat_state(nnx.state(plain, (nnx.Param, nnx.BatchStat))))
    for path, target in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        value = source[path][...]
        for axis, size in enumerate(target.shape):
            value = pad_axis(value, size, axis)
        target.set_value(jax.device_put(value, target[...].sharding))


def cut_kernel(kernel, exchange, c_out):
    """A plain kernel times the expanded mask of a (padded) exchange."""
    if not isinstance(exchange, dj.Exchange):
        return kernel
    wide = expand_mask(exchange.mask[...], c_out)
    return kernel * np.asarray(wide)[: kernel.shape[-2], : kernel.shape[-1]]


def error(a, b):
    """Largest difference relative to the largest magnitude."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    return np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30)


def close(a, b, bound):
    assert error(a, b) <= bound, f"relative error {error(a, b):.2e} > {bound:.0e}"


def import_torchvision():
    """torchvision, of which the Python half is enough; None if it is not installed.

    Where its library of operations does not load, having been built for another torch, the two that
    its import asks for are named here; transformers imports it as well.
    """
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        return importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        torch.torchvision_operations = library  # which are forgotten with the object
        return importlib.import_module("torchvision")
