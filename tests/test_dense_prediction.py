"""SSD, DeepLab, LR-ASPP, EDSR, RCAN: masked on N devices = emulated = packed; nothing hidden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, meshes, random_masks, randomize

import disco_jax as dj
from disco_jax.plan.share import share
from disco_jax.trace import modules

CASES = {
    "ssd300": ({"width": 8, "num_classes": 5, "extra": 2}, (2, 96, 96, 3)),
    "ssd_resnet18": (
        {"width": 8, "num_classes": 5, "extra": 2, "result_dtype": "float16"},
        (2, 64, 64, 3),
    ),
    "ssd_resnet50": ({"width": 8, "num_classes": 5, "extra": 2}, (2, 64, 64, 3)),
    "deeplabv3_resnet50": ({"width": 8, "num_classes": 5, "head_width": 16}, (2, 65, 65, 3)),
    "deeplabv3_resnet18": (
        {"width": 8, "num_classes": 6, "head_width": 12, "output_stride": 16},
        (2, 49, 65, 3),
    ),
    "lraspp_resnet18": ({"width": 8, "num_classes": 5, "head_width": 16}, (2, 65, 65, 3)),
    "edsr": ({"width": 8, "depth": 2, "scale": 4}, (2, 12, 11, 3)),
    "rcan": (
        {"width": 8, "depth": 1, "groups": 2, "scale": 3, "reduction": 4, "parts": True},
        (2, 12, 11, 3),
    ),
}
QUICK = [
    ("ssd300", 2),
    ("ssd_resnet18", 4),
    ("deeplabv3_resnet18", 3),
    ("lraspp_resnet18", 2),
    ("edsr", 3),
    ("rcan", 4),
]
SLOW = sorted({(name, nodes) for name in CASES for nodes in (2, 4)} - set(QUICK))


@pytest.mark.parametrize(
    ("name", "nodes"), QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_all_lives_are_equal(name, nodes):
    options, shape = CASES[name]
    images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    lives = []
    for mesh in meshes(nodes):
        model = dj.models.create(name, mesh=mesh, rngs=nnx.Rngs(0), **options)
        randomize(model)
        random_masks(model, 0.4)
        frozen = dj.freeze(model, images)
        lives += [dj.plan.Program(model)(images), frozen(images)]
        if not mesh.emulated:
            dj.verify(frozen, images)
    bound = 1e-3 if "result_dtype" in options else 1e-5  # half a step of float16
    for life in lives[1:]:
        jax.tree.map(lambda a, b: close(a, b, bound), life, lives[0])


@pytest.mark.parametrize("name", ["ssd300", "deeplabv3_resnet18", "lraspp_resnet18", "edsr"])
def test_the_function_does_not_depend_on_the_nodes(name):
    """The same numbers on one node, and on three with their dead channels."""
    options, shape = CASES[name]
    images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    found = []
    for nodes in (1, 3):
        mesh = dj.NodeMesh(nodes, emulate=True)
        model = dj.models.create(name, mesh=mesh, rngs=nnx.Rngs(0), **options)
        found.append(dj.plan.Program(model)(images))
    jax.tree.map(lambda a, b: close(a, b, 1e-5), *found)


def test_an_auxiliary_head_is_for_training_alone(tmp_path):
    """It reads an exchange that the backbone has anyway, and sends nothing of its own."""
    options, shape = CASES["deeplabv3_resnet18"]
    mesh, images = dj.NodeMesh(2, emulate=True), jnp.ones(shape)
    plain, helped = (
        dj.models.create("deeplabv3_resnet18", mesh=mesh, rngs=nnx.Rngs(0), auxiliary=a, **options)
        for a in (False, True)
    )
    frozen = [dj.freeze(model, images, wire_dtype="int8") for model in (plain, helped)]
    assert frozen[0].plan.traffic_bytes == frozen[1].plan.traffic_bytes
    frozen[1].save(tmp_path / "packed")
    loaded = dj.load(tmp_path / "packed", mesh)
    close(loaded(images), frozen[1](images), 0)
    share(loaded, 0)(images)  # whose dropout has a state
    helped.train()
    main, side = helped(images)
    assert main.shape == side.shape == (*shape[:3], 6)


def test_upscaling_learns_nothing_it_cannot_keep_on_a_node():
    """Four channels of one pixel shuffle lie on one node, whatever the number of nodes."""
    for nodes in (2, 3, 4):
        mesh = dj.NodeMesh(nodes, emulate=True)
        model = dj.models.create("edsr", mesh=mesh, width=6, depth=1, rngs=nnx.Rngs(0))
        assert model.upsample[0].kernel.shape[-1] % (4 * nodes) == 0
        assert model(jnp.ones((1, 5, 4, 3))).shape == (1, 10, 8, 3)


def test_parts_of_an_enlargement_travel_instead_of_its_channels():
    """Three for each node and pixel, not its 8; the bias of the last layer is on both nodes."""
    plans = []
    for parts in (False, True):
        mesh = dj.NodeMesh(2, emulate=True)
        model = dj.models.create(
            "edsr", mesh=mesh, width=16, depth=1, parts=parts, rngs=nnx.Rngs(0)
        )
        plans.append(dj.freeze(model, jnp.ones((1, 5, 4, 3))).plan)
    apart, added = plans
    pixels, channels, result, dead = 10 * 8, 16, 3, 1
    saved = channels + (result + dead) - 2 * result
    assert apart.traffic_bytes - added.traffic_bytes == 4 * pixels * saved
    assert added.layers[-1].weight_bytes == 4 * (9 * channels // 2 * result + result)


FULL = {
    "ssd300": ((1, 300, 300, 3), (1, 300, 300, 3), {}),
    "deeplabv3_resnet50": ((1, 513, 513, 3), (1, 65, 65, 3), {}),
    "edsr": ((1, 360, 640, 3), (1, 24, 20, 3), {}),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_in_shapes(name):
    """The plan at full size, from shapes alone: as many bytes as the masks say."""
    full, _, options = FULL[name]
    mesh = dj.NodeMesh(2, emulate=True)
    model = nnx.eval_shape(lambda: dj.models.create(name, mesh=mesh, rngs=nnx.Rngs(0), **options))
    traced = dj.trace(model, jax.ShapeDtypeStruct(full, jnp.float32))
    gathered = {path for path, m in modules(model) if isinstance(m, dj.Gather)}
    results = [r for r in traced.exchanges if r.path in gathered]
    assert len(results) == {"ssd300": 12, "deeplabv3_resnet50": 1, "edsr": 1}[name]
    assert all(record.shape[-1] % 2 == 0 for record in traced.exchanges)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("name", FULL)
def test_all_channels(name, nodes):
    """The networks as they are, on small images (SSD300 on its own): equal, nothing hidden."""
    _, shape, options = FULL[name]
    images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    lives = []
    for mesh in meshes(nodes):
        model = dj.models.create(name, mesh=mesh, rngs=nnx.Rngs(0), **options)
        randomize(model)
        random_masks(model, 0.2)
        frozen = dj.freeze(model, images)
        lives += [dj.plan.Program(model)(images), frozen(images)]
        if not mesh.emulated:
            dj.verify(frozen, images)
    for life in lives[1:]:
        jax.tree.map(lambda a, b: close(a, b, 1e-5), life, lives[0])
