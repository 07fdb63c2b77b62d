"""Attention on nodes = emulated = flax.nnx.MultiHeadAttention with kernels x expanded mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, cut_kernel, meshes, random_masks, randomize

import disco_jax as dj
from disco_jax.layers import LayerScale, MultiHeadAttention, PositionEmbedding, StochasticDepth
from disco_jax.layers.embed import sincos
from disco_jax.trace import exchanges, modules

FLOAT32 = 1e-5
PROJECTIONS = ("query", "key", "value", "out")


def plain_attention(attention, heads, kv_heads, features):
    """Flax's layer with the same weights, those behind the masks cut; dead heads dropped."""
    plain = nnx.MultiHeadAttention(
        heads, features, num_kv_heads=kv_heads, decode=False, rngs=nnx.Rngs(0)
    )
    for name in PROJECTIONS:
        ours, theirs = getattr(attention, name), getattr(plain, name)
        kernel = np.asarray(ours.kernel[...])[: ours.in_features, : ours.out_features]
        kernel = cut_kernel(kernel, ours.exchange, ours.kernel.shape[-1])
        theirs.kernel.set_value(jnp.reshape(kernel, theirs.kernel.shape))
        bias = np.asarray(ours.bias[...])[: ours.out_features]
        theirs.bias.set_value(jnp.reshape(bias, theirs.bias.shape))
    return plain


@pytest.mark.parametrize(
    ("nodes", "heads", "kv_heads"), [(1, 2, 2), (2, 4, 4), (2, 3, 3), (4, 8, 4), (2, 6, 3)]
)
def test_attention(nodes, heads, kv_heads):
    features = 8 * heads
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, features)), jnp.float32)
    lives = []
    for mesh in meshes(nodes):
        attention = MultiHeadAttention(
            heads, features, num_kv_heads=kv_heads, mesh=mesh, pad=True, rngs=nnx.Rngs(1)
        )
        for name in PROJECTIONS:  # biases start from zero
            bias = getattr(attention, name).bias
            living = jnp.arange(bias.size) < getattr(attention, name).out_features
            bias.set_value(bias[...] + 0.1 * living)
        random_masks(attention, 0.5)
        lives.append(attention)
    plain = plain_attention(lives[0], heads, kv_heads, features)
    expected, plain_grad = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(plain(x))))(x)
    wide = dj.partition.pad_channels(x, lives[0].exchange.mesh)
    for attention in lives:
        graphdef, params, rest = nnx.split(attention, nnx.Param, ...)

        def loss(params, x, graphdef=graphdef, rest=rest):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, params, rest)(x)[..., :features]))

        value, (grads, dx) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, wide)
        close(value, expected, FLOAT32)
        close(dx[..., :features], plain_grad, FLOAT32)
        no_dead_gradients(attention, grads)
        frozen = dj.freeze(attention, wide)
        close(frozen(wide)[..., :features], plain(x), FLOAT32)
        assert [e.path for e in frozen.plan.exchanges] == ["exchange", "out.exchange"]
        if not frozen.mesh.emulated:
            dj.verify(frozen, wide)


def no_dead_gradients(attention, grads):
    for path, grad in nnx.to_flat_state(grads):
        layer = getattr(attention, path[0])
        dead = np.array(grad[...])
        rows = slice(layer.in_features) if path[-1] == "kernel" else ...
        dead[
            (rows, slice(layer.out_features)) if path[-1] == "kernel" else slice(layer.out_features)
        ] = 0
        assert not dead.any(), f"{path}: a dead channel has a gradient"


@pytest.mark.parametrize(
    ("heads", "changes", "message"),
    [
        (3, {}, "`qkv_features` (=16) must be divisible by `num_heads` (=3)"),
        (4, {"num_kv_heads": 3}, "`num_heads` (=4) must be divisible by `num_kv_heads` (=3)"),
        (1, {}, "must be divisible by `nodes` (=2) times `unit` (=16); pass pad=True"),
    ],
)
def test_heads_that_do_not_divide(heads, changes, message):
    mesh = dj.NodeMesh(2, emulate=True)
    with pytest.raises(dj.DiscoError) as error:
        MultiHeadAttention(heads, 16, **changes, mesh=mesh, rngs=nnx.Rngs(0))
    assert message in str(error.value)


VITS = {
    "distilled": {"pool": "distilled", "position": "learned", "layer_scale": 0.5},
    "mean": {},
    "class": {"pool": "class", "patch": 8},
}


@pytest.mark.parametrize(("kind", "nodes"), [("distilled", 2), ("mean", 4), ("class", 3)])
def test_vision_transformer(kind, nodes):
    """Masked on devices = emulated = packed; full masks = one node; dead heads change nothing."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    found = []
    for mesh in (dj.NodeMesh(1), *meshes(nodes)):
        model = dj.models.create(
            "vit_micro", mesh=mesh, image_size=8, num_classes=10, rngs=nnx.Rngs(0), **VITS[kind]
        )
        model.eval()
        found.append(model)
    alone, *lives = found
    expected = dj.plan.Program(alone)(images)
    for model in lives:
        close(dj.plan.Program(model)(images), expected, FLOAT32)
        random_masks(model, 0.4)
    masked = [dj.plan.Program(model)(images) for model in lives]
    assert np.abs(np.asarray(masked[0]) - np.asarray(expected)).max() > 1e-3
    close(masked[0], masked[1], FLOAT32)
    for model in lives:
        frozen = dj.freeze(model, images)
        close(frozen(images), masked[0], FLOAT32)
        if not frozen.mesh.emulated:
            dj.verify(frozen, images)


def test_assignment_changes_no_transformer():
    """Residual stream and hidden channels are renumbered; heads stay whole where they are."""
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create(
        "vit_micro", mesh=mesh, image_size=8, pool="class", position="learned", rngs=nnx.Rngs(0)
    )
    randomize(model)
    model.eval()
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    before = dj.plan.Program(model)(images)
    kernel = np.asarray(model.blocks[0].mlp.dense1.kernel[...])
    local = dj.sparsify.assign(model, images, restarts=1)
    assert 0.51 < local < 1, "strong connections become local"
    assert np.abs(kernel - model.blocks[0].mlp.dense1.kernel[...]).max() > 0
    close(dj.plan.Program(model)(images), before, FLOAT32)


def test_norm_over_a_nodes_own_channels_moves_nothing():
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create(
        "vit_micro", mesh=mesh, image_size=8, norm_scope="node", rngs=nnx.Rngs(0)
    )
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    moved = [e.path for e in dj.freeze(model, images).plan.exchanges]
    assert not any("statistics" in path for path in moved)
    assert len(moved) == 6 * 4 + 1  # and the head's


def test_query_key_and_value_pay_once():
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create("vit_micro", mesh=mesh, image_size=8, rngs=nnx.Rngs(0))
    plan = dj.freeze(model, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)).plan
    shared = next(e for e in plan.exchanges if e.path == "blocks.0.attention.exchange")
    assert {path.split(".")[-1] for path in shared.consumers} == {"query", "key", "value"}
    assert shared.traffic_bytes(2) == 4 * 64 * 4  # tokens x channels x float32


def test_class_token_alone_goes_to_the_head():
    """After the last block only the tokens that are read are normalised and sent."""
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create(
        "vit_micro", mesh=mesh, image_size=8, pool="distilled", rngs=nnx.Rngs(0)
    )
    plan = dj.freeze(model, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)).plan
    positions = {e.path: e.positions for e in plan.exchanges}
    assert positions["blocks.5.norm1.statistics"] == (6,)
    assert positions["norm.statistics"] == (2,)
    assert positions["heads.0.exchange"] == positions["heads.1.exchange"] == (1,)


def test_products_of_attention_are_counted():
    """Scores and weighted values: 2 t² c, shared by the nodes; dead heads count for a node only."""
    mesh = dj.NodeMesh(3, emulate=True)
    model = dj.models.create("vit_micro", mesh=mesh, image_size=16, rngs=nnx.Rngs(0))
    plan = dj.freeze(model, jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)).plan
    layer = next(p for p in plan.layers if p.path == "blocks.0.attention.attend")
    assert layer.single_node_macs == 2 * 16**2 * 64
    assert layer.macs == 2 * 16**2 * (6 * 16) // 3
    assert layer.weight_bytes == layer.single_node_weight_bytes == 0


def test_sincos_is_that_of_its_formula():
    table = sincos((3, 5), 16)
    row, column, k = 2, 3, 1
    angle = 10000 ** (-k / 4)
    token = table[row * 5 + column]
    expected = [
        np.sin(column * angle),
        np.cos(column * angle),
        np.sin(row * angle),
        np.cos(row * angle),
    ]
    np.testing.assert_allclose(token[k::4], expected)


def test_stochastic_depth_drops_whole_examples():
    drop = StochasticDepth(0.5, ndim=3, rngs=nnx.Rngs(0))
    y = np.asarray(drop(jnp.ones((64, 3, 4))))
    rows = y.reshape(64, -1)
    assert all(row.std() == 0 for row in rows)
    assert {*np.unique(rows)} == {0.0, 2.0}
    drop.eval()
    assert np.asarray(drop(jnp.ones((4, 3, 4)))).min() == 1


def test_layer_scale_starts_small_and_positions_refuse_other_sizes():
    mesh = dj.NodeMesh(2, emulate=True)
    np.testing.assert_allclose(LayerScale(4, mesh=mesh)(jnp.ones((1, 4))), 1e-5)
    position = PositionEmbedding((2, 2), 4, mesh=mesh, rngs=nnx.Rngs(0))
    with pytest.raises(dj.DiscoError, match=r"`tokens` \(=9\) must be the 4"):
        position(jnp.ones((1, 9, 4)))


def test_transformer_trains_with_masks_and_stochastic_depth():
    """Gradients reach every parameter, and random streams go on."""
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create(
        "vit_micro",
        mesh=mesh,
        image_size=8,
        in_channels=1,
        num_classes=10,
        drop_path=0.2,
        rngs=nnx.Rngs(0),
    )
    randomize(model)
    assert all(e.name for e in exchanges(model).values())
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        merged = nnx.merge(graphdef, params, rest, copy=True)
        return jnp.sum(jnp.sin(merged(jnp.ones((4, 8, 8, 1)))))

    grads = jax.jit(jax.grad(loss))(params)
    bias_of_keys = "attention.key.bias"  # moves all scores of a query alike
    for path, grad in nnx.to_flat_state(grads):
        name = ".".join(map(str, path))
        assert name.endswith(bias_of_keys) or np.abs(grad[...]).max() > 0, name
    assert any(isinstance(m, StochasticDepth) for _, m in modules(model))
