"""Masked on N devices = emulated = plain Flax with kernel x expanded mask; packed = masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import NODES, close, cut_kernel, meshes, random_mask
from hypothesis import given
from hypothesis import strategies as st

import disco_jax as dj
from disco_jax.partition import pad_axis

FLOAT32 = 1e-5


def value_and_grads(layer, x, alive=None):
    """Outputs, and gradients of a random projection with respect to weights and input.

    ``alive`` is the number of output channels that the projection reads.
    """
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def project(params, x):
        y = nnx.merge(graphdef, params, rest, copy=True)(x)
        living = y[..., :alive]
        weights = np.random.default_rng(9).normal(size=living.shape)
        return jnp.sum(living * weights.astype(y.dtype)), y

    grads, y = jax.jit(jax.grad(project, (0, 1), has_aux=True))(params, x)
    return y, dict(nnx.to_flat_state(grads[0])), grads[1]


def check_layer(make, make_plain, x_shape, density, nodes, seed):
    """Compares all lives of a layer with plain Flax.

    ``make(mesh)`` builds the distributed layer, ``make_plain()`` the Flax one from the same seed.
    """
    rng = np.random.default_rng(seed)
    real, emulated = meshes(nodes)
    layers = [make(real), make(emulated)]
    plain = make_plain()
    exchange = layers[0].exchange
    masked = isinstance(exchange, dj.Exchange)
    if masked:
        mask = random_mask(exchange, density, seed)
        for layer in layers:
            layer.exchange.set_mask(mask)
    c_out = layers[0].kernel.shape[-1]
    cut = cut_kernel(plain.kernel[...], exchange, c_out)
    plain.kernel.set_value(jnp.asarray(cut))
    x = jnp.asarray(rng.normal(size=x_shape), jnp.float32)
    wide = pad_axis(x, exchange.channels, -1)
    y, plain_grads, dx = value_and_grads(plain, x)
    results = [value_and_grads(layer, wide, alive=y.shape[-1]) for layer in layers]
    for got, grads, got_dx in results:
        assert not np.asarray(got)[..., y.shape[-1] :].any(), "a dead channel lives"
        close(np.asarray(got)[..., : y.shape[-1]], y, FLOAT32)
        close(np.asarray(got_dx)[..., : x.shape[-1]], dx, FLOAT32)
        close_and_dead(grads, "kernel", cut_kernel(plain_grads[("kernel",)][...], exchange, c_out))
        if plain.bias is not None:
            close_and_dead(grads, "bias", plain_grads[("bias",)][...])
    close(results[0][2], results[1][2], FLOAT32)
    if masked:
        for layer in layers:
            frozen = dj.freeze(layer, wide)
            close(frozen(wide), results[0][0], FLOAT32)
            if not frozen.mesh.emulated:
                dj.verify(frozen, wide)
                assert frozen.plan.traffic_bytes == planned_bytes(mask, x_shape)


def close_and_dead(grads, name, expected):
    """The living part of a gradient is as expected; nothing moves dead weights."""
    got = np.array(grads[(name,)][...])
    alive = tuple(map(slice, expected.shape))
    close(got[alive], expected, FLOAT32)
    got[alive] = 0
    assert not got.any(), "a dead channel has a gradient"


def planned_bytes(mask, x_shape):
    """Bytes per example from the mask alone; a hop's messages are as wide as its widest."""
    nodes = len(mask)
    blocks = np.asarray(mask).reshape(nodes, nodes, -1).sum(-1)
    floats = 0
    for offset in range(1, nodes):
        counts = [blocks[(s + offset) % nodes, s] for s in range(nodes)]
        floats += max(counts) * np.count_nonzero(counts)
    return 4 * floats * int(np.prod(x_shape[1:-1]))


densities = st.sampled_from([0.0, 0.3, 0.7, 1.0])


@pytest.mark.parametrize("nodes", NODES)
@given(data=st.data())
def test_conv(nodes, data):
    c_in = nodes * data.draw(st.integers(1, 3)) - data.draw(st.integers(0, min(1, nodes - 1)))
    c_out = nodes * data.draw(st.integers(1, 3)) - data.draw(st.integers(0, min(1, nodes - 1)))
    kernel = data.draw(st.sampled_from([(1, 1), (3, 3), (3, 2), (5, 1)]))
    kwargs = {
        "strides": data.draw(st.sampled_from([1, 2, (2, 1)])),
        "padding": data.draw(st.sampled_from(["SAME", "VALID", 1, ((0, 1), (2, 0)), "CIRCULAR"])),
        "kernel_dilation": data.draw(st.sampled_from([1, 2])),
        "use_bias": data.draw(st.booleans()),
    }
    shape = (data.draw(st.integers(1, 2)), 11, data.draw(st.integers(9, 12)), c_in)
    seed = data.draw(st.integers(0, 99))
    check_layer(
        lambda mesh: dj.layers.Conv(
            c_in, c_out, kernel, mesh=mesh, pad=True, rngs=nnx.Rngs(seed), **kwargs
        ),
        lambda: nnx.Conv(c_in, c_out, kernel, rngs=nnx.Rngs(seed), **kwargs),
        shape,
        data.draw(densities),
        nodes,
        seed,
    )


@pytest.mark.parametrize("nodes", NODES)
@given(data=st.data())
def test_dense(nodes, data):
    c_in = nodes * data.draw(st.integers(1, 5)) - data.draw(st.integers(0, min(1, nodes - 1)))
    c_out = nodes * data.draw(st.integers(1, 5)) - data.draw(st.integers(0, min(1, nodes - 1)))
    tokens = data.draw(st.sampled_from([(), (3,), (2, 5)]))
    bias, seed = data.draw(st.booleans()), data.draw(st.integers(0, 99))
    check_layer(
        lambda mesh: dj.layers.Dense(
            c_in, c_out, mesh=mesh, pad=True, use_bias=bias, rngs=nnx.Rngs(seed)
        ),
        lambda: nnx.Linear(c_in, c_out, use_bias=bias, rngs=nnx.Rngs(seed)),
        (2, *tokens, c_in),
        data.draw(densities),
        nodes,
        seed,
    )


@pytest.mark.parametrize("nodes", NODES)
@given(data=st.data())
def test_grouped_conv(nodes, data):
    groups = nodes * data.draw(st.integers(1, 2)) * (2 if nodes == 1 else 1)
    c_in = groups * data.draw(st.integers(1, 3))
    c_out = groups * data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 99))
    kwargs = {"strides": data.draw(st.sampled_from([1, 2])), "feature_group_count": groups}
    check_layer(
        lambda mesh: dj.layers.Conv(c_in, c_out, (3, 3), mesh=mesh, rngs=nnx.Rngs(seed), **kwargs),
        lambda: nnx.Conv(c_in, c_out, (3, 3), rngs=nnx.Rngs(seed), **kwargs),
        (2, 7, 8, c_in),
        1.0,
        nodes,
        seed,
    )


@pytest.mark.parametrize("nodes", NODES)
def test_depthwise_conv_pads(nodes):
    check_layer(
        lambda mesh: dj.layers.Conv(
            7, 7, (3, 3), mesh=mesh, pad=True, feature_group_count=7, rngs=nnx.Rngs(0)
        ),
        lambda: nnx.Conv(7, 7, (3, 3), feature_group_count=7, rngs=nnx.Rngs(0)),
        (2, 6, 6, 7),
        1.0,
        nodes,
        0,
    )


def check_norm(make, make_plain, shape, nodes):
    """A norm in both lives against Flax, features that do not divide included."""
    x = jnp.asarray(np.random.default_rng(0).normal(2.0, 3.0, shape), jnp.float32)
    plain = make_plain()
    y, plain_grads, dx = value_and_grads(plain, x)
    for mesh in meshes(nodes):
        norm = make(mesh)
        channels = norm.scale.shape[0]
        got, grads, got_dx = value_and_grads(norm, pad_axis(x, channels, -1))
        assert not np.asarray(got)[..., shape[-1] :].any()
        close(np.asarray(got)[..., : shape[-1]], y, FLOAT32)
        if channels == shape[-1]:
            close(got_dx, dx, 1e-4)
            close(grads[("scale",)][...], plain_grads[("scale",)][...], 1e-4)


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("features", [24, 23])
def test_layer_norm(nodes, features):
    check_norm(
        lambda mesh: dj.layers.LayerNorm(features, mesh=mesh, pad=True, rngs=nnx.Rngs(0)),
        lambda: nnx.LayerNorm(features, rngs=nnx.Rngs(0)),
        (2, 5, features),
        nodes,
    )


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("features", [24, 23])
def test_batch_norm(nodes, features):
    check_norm(
        lambda mesh: dj.layers.BatchNorm(features, mesh=mesh, pad=True, rngs=nnx.Rngs(0)),
        lambda: nnx.BatchNorm(features, rngs=nnx.Rngs(0)),
        (2, 5, 4, features),
        nodes,
    )


@pytest.mark.parametrize("nodes", NODES)
def test_group_norm(nodes):
    check_norm(
        lambda mesh: dj.layers.GroupNorm(48, 24, mesh=mesh, rngs=nnx.Rngs(0)),
        lambda: nnx.GroupNorm(48, 24, rngs=nnx.Rngs(0)),
        (2, 5, 4, 48),
        nodes,
    )


@pytest.mark.parametrize("nodes", NODES)
def test_layer_norm_of_a_node_is_flax_on_its_channels(nodes):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 24)), jnp.float32)
    flat = nnx.LayerNorm(24 // nodes, use_fast_variance=False, rngs=nnx.Rngs(0))
    expected = jnp.concatenate([flat(block) for block in jnp.split(x, nodes, -1)], -1)
    for mesh in meshes(nodes):
        norm = dj.layers.LayerNorm(24, mesh=mesh, scope="node", rngs=nnx.Rngs(0))
        close(norm(x), expected, FLOAT32)


@pytest.mark.parametrize("nodes", NODES)
def test_node_local_operations(nodes):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 48 * 2)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(2, 3, 4, 24)), jnp.float32)

    def by_node(function):
        return jnp.concatenate(
            list(map(function, jnp.split(x, nodes, -1), jnp.split(y, nodes, -1))), -1
        )

    def shuffled(a, _):
        b, h, w, c = a.shape
        a = a.reshape(b, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        return a.reshape(b, 2 * h, 2 * w, c // 4)

    for mesh in meshes(nodes):
        cat = dj.layers.concat([x, y], mesh=mesh)
        close(cat, by_node(lambda a, b: jnp.concatenate([a, b], -1)), 0)
        halves = dj.layers.split(x, 2, mesh=mesh)
        close(dj.layers.concat(halves, mesh=mesh), x, 0)
        close(halves[1], by_node(lambda a, _: a[..., a.shape[-1] // 2 :]), 0)
        flat = by_node(lambda a, _: a.reshape(2, -1))
        close(dj.layers.flatten(x, mesh=mesh), flat, 0)
        close(dj.layers.pixel_shuffle(x, 2, mesh=mesh), by_node(shuffled), 0)
        larger = jax.image.resize(x, (2, 7, 9, x.shape[-1]), "bilinear")
        close(dj.layers.resize(x, (7, 9), mesh=mesh), larger, FLOAT32)


class Summed(nnx.Module):
    """A layer that reads `Parts`, and the sum of the parts."""

    def __init__(self, layer):
        self.layer = layer
        self.sum = dj.Sum(layer.out_features, mesh=layer.mesh)

    def __call__(self, x):
        return self.sum(self.layer(x))


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("kind", ["Conv", "Dense"])
def test_parts_add_up(kind, nodes):
    """To the plain layer, gradients included; one gather of the outputs is all that moves."""
    window = ((3, 2),) if kind == "Conv" else ()
    plain = getattr(nnx, {"Dense": "Linear"}.get(kind, kind))(7, 3, *window, rngs=nnx.Rngs(0))
    plain.bias.set_value(jnp.arange(3.0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6, 7)), jnp.float32)
    y, plain_grads, dx = value_and_grads(plain, x)
    for mesh in meshes(nodes):
        parts = dj.Parts(7, mesh=mesh, pad=True)
        layer = getattr(dj.layers, kind)(7, 3, *window, exchange=parts, rngs=nnx.Rngs(0))
        layer.bias.set_value(plain.bias[...])
        wide = pad_axis(x, parts.channels, -1)
        model = Summed(layer)
        got, grads, got_dx = value_and_grads(model, wide)
        close(got, y, FLOAT32)
        close(got_dx[..., :7], dx, FLOAT32)
        kernel = np.asarray(grads[("layer", "kernel")][...])
        close(kernel[..., :7, :], plain_grads[("kernel",)][...], FLOAT32)
        close(grads[("layer", "bias")][...], plain_grads[("bias",)][...], FLOAT32)
        traced = dj.trace(model, wide)
        assert [r.shape[-1] for r in traced.exchanges] == [3 * nodes] * (nodes > 1)
        window_size = 6 if kind == "Conv" else 1
        assert traced.layers[0].macs == 30 * window_size * parts.channels // nodes * 3
        if mesh.distributed:
            text = jax.jit(model).lower(wide).compile().as_text()
            assert text.count(" collective-permute(") == nodes - 1
            assert not any(f" {other}(" in text for other in ("all-reduce", "all-gather"))


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16"])
def test_a_result_is_what_arrives(wire_dtype):
    """On every node, its own part included, and emulated as well."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), jnp.float32)
    for mesh in meshes(3):
        gather = dj.Gather(5, mesh=mesh, always=True, wire_dtype=wire_dtype)
        expected = x[..., :5].astype(wire_dtype).astype(jnp.float32)
        np.testing.assert_array_equal(gather(x), expected)
    with pytest.raises(dj.DiscoError, match="must be a floating dtype"):
        dj.Gather(5, mesh=mesh, wire_dtype="int8")


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_passes_a_result_unrounded(dtype, wire_dtype):
    """The way back has no wire dtype: the slope of every channel, dead ones 0."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 6)), dtype)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 5)), dtype)
    for mesh in meshes(3):
        gather = dj.Gather(5, mesh=mesh, always=True, wire_dtype=wire_dtype)
        gradient = jax.jit(jax.grad(lambda x, gather=gather: jnp.sum(gather(x) * weights)))(x)
        expected = pad_axis(weights, 6, -1).astype(jnp.float32)
        close(gradient.astype(jnp.float32), expected, 1e-6 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("nodes", NODES)
def test_l2_norm(nodes):
    """Over the channels of all nodes; where all are 0 it stays 0, and so does the gradient."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 10)), jnp.float32)
    x = x.at[0, 0, 0].set(0)
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    expected = 20 * x / jnp.where(norm > 0, norm, 1)
    for mesh in meshes(nodes):
        layer = dj.layers.L2Norm(10, mesh=mesh, pad=True)
        wide = pad_axis(x, layer.scale.shape[0], -1)
        close(layer(wide)[..., :10], expected, FLOAT32)
        gradient = jax.grad(lambda x, layer=layer: layer(x).sum())(wide)
        assert np.isfinite(gradient).all()


def test_initial_weights_do_not_depend_on_the_nodes():
    plain = nnx.Conv(6, 7, (3, 3), rngs=nnx.Rngs(3))
    conv = dj.layers.Conv(6, 7, (3, 3), mesh=dj.NodeMesh(4), pad=True, rngs=nnx.Rngs(3))
    assert conv.kernel.shape == (3, 3, 8, 8)
    np.testing.assert_array_equal(conv.kernel[..., :6, :7], plain.kernel[...])
    assert not np.asarray(conv.kernel[..., 6:, :]).any()


def test_data_parallel_is_the_same_function():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 5, 8)), jnp.float32)
    results = []
    for mesh in (dj.NodeMesh(2, data=4, emulate=False), dj.NodeMesh(2, data=2, emulate=True)):
        conv = dj.layers.Conv(8, 8, (3, 3), mesh=mesh, rngs=nnx.Rngs(0))
        conv.exchange.set_mask(random_mask(conv.exchange, 0.5))
        results.append(value_and_grads(conv, x))
        frozen = dj.freeze(conv, x)
        close(frozen(x), results[-1][0], FLOAT32)
    close(results[0][0], results[1][0], FLOAT32)
    close(results[0][1][("kernel",)][...], results[1][1][("kernel",)][...], FLOAT32)
