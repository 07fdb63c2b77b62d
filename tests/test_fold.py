"""Batch normalisation is folded where that changes nothing, and only there."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, meshes, random_masks, randomize

import disco_jax as dj
from disco_jax.plan.fold import Folded, foldable
from disco_jax.trace import modules


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("emulate", [False, True])
def test_all_norms_of_a_resnet_are_folded(emulate):
    mesh = dj.NodeMesh(2, emulate=emulate)
    model = dj.models.create("resnet8", mesh=mesh, num_classes=10, width=8, rngs=nnx.Rngs(0))
    randomize(model)
    random_masks(model, 0.5)
    x = images(2, 32, 32, 3)
    frozen = dj.freeze(model, x)
    kinds = {type(m) for _, m in modules(frozen.model)}
    assert Folded in kinds
    assert dj.layers.BatchNorm not in kinds
    close(frozen(x), dj.plan.Program(model)(x), 1e-5)
    assert len(foldable(model, x)) == sum(
        isinstance(m, dj.layers.BatchNorm) for _, m in modules(model)
    )


class Net(nnx.Module):
    """Two layers and two norms, joined as a test wants them."""

    def __init__(self, mesh, wire, **norm):
        rngs = nnx.Rngs(0)
        self.wire = wire
        self.a = dj.layers.Conv(4, 8, (3, 3), mesh=mesh, rngs=rngs)
        self.b = dj.layers.Conv(8, 8, (1, 1), mesh=mesh, use_bias=False, rngs=rngs)
        self.m = dj.layers.BatchNorm(8, mesh=mesh, rngs=rngs, **norm)
        self.n = dj.layers.BatchNorm(8, mesh=mesh, rngs=rngs, **norm)

    def __call__(self, x):
        return self.wire(self, x)


WIRINGS = {
    "in a row": (lambda s, x: s.n(s.b(nnx.relu(s.m(s.a(x))))), {"m": "a", "n": "b"}),
    "read beside": (lambda s, x: s.n(y := s.b(s.m(s.a(x)))) + y, {"m": "a"}),
    "relu between": (lambda s, x: s.n(nnx.relu(s.b(s.m(s.a(x))))), {"m": "a"}),
    "norm first": (lambda s, x: s.b(s.m(nnx.relu(s.a(x)))), {}),
    "two norms of one": (lambda s, x: s.m(y := s.b(s.a(x))) + s.n(y), {}),
    "one norm of two": (lambda s, x: s.m(y := s.a(x)) + s.m(s.b(y)), {}),
    "layer twice": (lambda s, x: s.n(s.b(s.n(s.b(s.a(x))))), {"n": "b"}),
    "layer twice, once beside": (lambda s, x: s.b(s.n(s.b(s.a(x)))), {}),
    "statistics of the batch": (
        lambda s, x: s.n(s.b(s.m(s.a(x), use_running_average=False))),
        {"n": "b"},
    ),
    "norm of a norm": (lambda s, x: s.n(s.m(s.a(x))), {"m": "a"}),
}


@pytest.mark.parametrize("name", WIRINGS)
def test_only_what_goes_nowhere_else_is_folded(name):
    wire, expected = WIRINGS[name]
    x = images(2, 5, 5, 4)
    for mesh in meshes(2):
        model = Net(mesh, wire)
        randomize(model)
        assert foldable(model, x) == expected
        close(dj.freeze(model, x)(x), dj.plan.Program(model)(x), 1e-5)


@pytest.mark.parametrize(
    "norm", [{"use_scale": False}, {"use_bias": False}, {"use_bias": False, "use_scale": False}]
)
def test_norms_without_scale_or_bias(norm):
    model = Net(dj.NodeMesh(2), WIRINGS["in a row"][0], **norm)
    randomize(model)
    x = images(2, 5, 5, 4)
    assert len(foldable(model, x)) == 2
    close(dj.freeze(model, x)(x), dj.plan.Program(model)(x), 1e-5)


def test_a_norm_that_changes_the_dtype_stays():
    model = Net(dj.NodeMesh(2), WIRINGS["in a row"][0], dtype=jnp.bfloat16)
    assert foldable(model, images(2, 5, 5, 4)) == {}


def test_the_masked_model_keeps_its_norms():
    model = Net(dj.NodeMesh(2), WIRINGS["in a row"][0])
    before = nnx.to_pure_dict(nnx.state(model))
    dj.freeze(model, images(2, 5, 5, 4))
    assert isinstance(model.m, dj.layers.BatchNorm)
    after = nnx.to_pure_dict(nnx.state(model))
    assert (np.asarray(before["a"]["kernel"]) == np.asarray(after["a"]["kernel"])).all()


def test_layers_that_share_a_kernel_keep_it():
    """What one normalisation does to it the other layer must not see."""
    wire = lambda s, x: nnx.relu(s.m(s.a(x))) + jnp.tanh(s.n(s.b(x)))  # noqa: E731
    for mesh in meshes(2):
        model = Net(mesh, wire)
        model.b = dj.layers.Conv(4, 8, (3, 3), mesh=mesh, use_bias=False, rngs=nnx.Rngs(1))
        model.b.kernel = model.a.kernel
        randomize(model)
        x = images(2, 5, 5, 4)
        assert foldable(model, x) == {}
        close(dj.freeze(model, x)(x), dj.plan.Program(model)(x), 1e-5)
