"""The examples train, and their layers are those of the libraries that they are written for."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from helpers import close

import disco_jax as dj
from disco_jax.interop.linen import DiscoConv, DiscoDense, apply_masks

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def test_nnx_in_three_lines():
    import nnx_digits

    accuracy, frozen = nnx_digits.main(steps=150)
    plan = frozen.plan
    assert accuracy > 0.8
    assert plan.traffic_bytes <= 0.2 * plan.dense_traffic_bytes
    lines = Path(nnx_digits.__file__).read_text().splitlines()
    assert sum(line.endswith("# disco") for line in lines) == 3


def test_linen():
    import linen_digits

    accuracy, kept = linen_digits.main(steps=200)
    assert accuracy > 0.6
    assert kept == pytest.approx(0.25, abs=0.02)


class Split(nn.Module):
    mesh: dj.NodeMesh

    @nn.compact
    def __call__(self, x):
        x = nn.relu(DiscoConv(4, 8, (3, 3), mesh=self.mesh, name="conv")(x))
        return DiscoDense(8, 6, mesh=self.mesh, name="head")(x.mean((1, 2)))


class Whole(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
        return nn.Dense(6, name="head")(x.mean((1, 2)))


@pytest.mark.parametrize("emulate", [True, False])
def test_linen_layers_equal_linens_own(emulate):
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
    split = Split(dj.NodeMesh(2, emulate=emulate))
    variables = split.init(jax.random.key(1), x)
    params = nn.unbox(variables["params"])
    close(split.apply(variables, x), Whole().apply({"params": params}, x), 1e-6)


def test_linen_masks_count_in_the_model():
    x = jnp.ones((1, 6, 6, 4))
    split = Split(dj.NodeMesh(2, emulate=True))
    variables = split.init(jax.random.key(1), x)
    tx = dj.sparsify.sparse_exchange(optax.sgd(0.0), density=0.0, steps=0)
    params = variables["params"]
    state = tx.init(params)
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    masks = apply_masks(variables["Mask"], state)
    kernel = nn.unbox(params)["head"]["kernel"]
    block = np.kron(np.eye(2), np.ones((4, 3)))
    conv = {"kernel": nn.unbox(params)["conv"]["kernel"] * np.kron(np.eye(2), np.ones((2, 4)))}
    conv["bias"] = nn.unbox(params)["conv"]["bias"]
    head = {"kernel": kernel * block, "bias": nn.unbox(params)["head"]["bias"]}
    expected = Whole().apply({"params": {"conv": conv, "head": head}}, x)
    close(split.apply({"params": params, "Mask": masks}, x), expected, 1e-6)


def test_masks_of_another_linen_model():
    x = jnp.ones((1, 6, 6, 4))
    variables = Split(dj.NodeMesh(2, emulate=True)).init(jax.random.key(1), x)
    state = dj.sparsify.sparse_exchange(optax.sgd(0.1), density=0.5, steps=1).init(
        variables["params"]
    )
    masks = {"conv": variables["Mask"]["conv"]}
    with pytest.raises(dj.DiscoError, match=r"'head\.exchange'.*model's masks.*'conv\.exchange'"):
        apply_masks(masks, state)
