"""ConvNeXt on nodes: the numbers of one node, and no hidden communication."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import close, randomize

import disco_jax as dj
from disco_jax.models.convnext import ConvNeXt

IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


def network(mesh, **options):
    options = {"layer_scale": 0.5, **options}
    model = ConvNeXt((1, 2), (12, 24), 5, mesh=mesh, rngs=nnx.Rngs(0), **options)
    dj.name_exchanges(model)
    model.eval()
    return model


@pytest.mark.parametrize(("nodes", "emulate"), [(2, True), (2, False), (4, False), (5, True)])
def test_nodes_equal_one(nodes, emulate):
    alone = dj.plan.Program(network(dj.NodeMesh(1)))(IMAGES)
    split = network(dj.NodeMesh(nodes, emulate=emulate))
    close(dj.plan.Program(split)(IMAGES), alone, 1e-5)


def test_frozen_it_communicates_what_the_plan_says():
    model = network(dj.NodeMesh(2))
    randomize(model)
    dj.sparsify.prune(model, density=0.3)
    frozen = dj.freeze(model, IMAGES)
    close(frozen(IMAGES), dj.plan.Program(model)(IMAGES), 1e-5)
    dj.verify(frozen, IMAGES)
    # Depthwise layers read nothing from others.
    assert not any("depthwise" in e.path for e in frozen.plan.exchanges)


def test_depth_is_dropped_in_training_only():
    model = network(dj.NodeMesh(2, emulate=True), drop_path=0.9)
    expected = model(IMAGES)
    model.train()
    assert np.abs(model(IMAGES) - expected).max() > 0
    model.eval()
    close(model(IMAGES), expected, 0)


def test_gradients_reach_every_parameter():
    model = network(dj.NodeMesh(2, emulate=True))
    gradients = nnx.grad(lambda model: (model(IMAGES) ** 2).sum())(model)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
