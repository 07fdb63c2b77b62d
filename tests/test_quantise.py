"""Exchanges that round in training as the wire does: the same numbers masked and packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, random_masks

import disco_jax as dj
from disco_jax import wire
from disco_jax.errors import DiscoError
from disco_jax.partition import owned
from disco_jax.trace import exchanges

RULES = (("conv2", "int4"), ("blocks.0", "float16"), ("", "int8"))
WIRES = ["float16", "bfloat16", "int8", "int4", RULES]


def resnet(mesh):
    return dj.models.create("resnet8", mesh=mesh, num_classes=10, width=8, rngs=nnx.Rngs(0))


def images(count=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, 8, 8, 3)), jnp.float32)


def dense(c_in):
    mesh = dj.NodeMesh(2, emulate=True)
    return dj.layers.Dense(c_in, 4, use_bias=False, mesh=mesh, rngs=nnx.Rngs(0))


def of_kernel(layer):
    """A layer without bias as a function of its kernel and input."""
    graphdef, kernel, rest = nnx.split(layer, nnx.Param, ...)
    return lambda value, x: nnx.merge(graphdef, jax.tree.map(lambda _: value, kernel), rest)(x)


@pytest.mark.parametrize("wire_dtype", WIRES, ids=str)
def test_masked_and_packed_round_alike(wire_dtype):
    """Emulated and distributed, uneven masks, widths that are odd; bytes as the plan says."""
    x, found = images(), []
    for emulate in (True, False):
        model = resnet(dj.NodeMesh(3, emulate=emulate))
        random_masks(model, 0.5)
        model.eval()
        exact = dj.plan.Program(model)(x)
        dj.sparsify.quantise(model, x, wire_dtype)
        found += [dj.plan.Program(model)(x), dj.freeze(model, x)(x)]
    for other in found[1:]:
        close(other, found[0], 1e-5)
    assert np.abs(np.asarray(found[0]) - np.asarray(exact)).max() > 1e-5  # something was rounded
    frozen = dj.freeze(model, jax.ShapeDtypeStruct(x.shape, x.dtype))  # the ranges are known
    dj.verify(frozen, x)


def test_ranges_and_wire_dtypes_can_be_chosen_anew():
    model, x = resnet(dj.NodeMesh(2, emulate=True)), images()
    dj.sparsify.quantise(model, x, "int4")
    plan = dj.freeze(model, x, wire_dtype="float16").plan
    assert {e.wire_dtype for e in plan.exchanges if e.hops} == {"float16"}


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 4, 6, 5), (2, 6, 3, 5), (2, 3, 5, 7), (2, 7)])
def test_int4_of_any_shape(shape):
    codes = np.random.default_rng(0).integers(16, size=shape).astype(np.float32)
    scale = wire.scale(jnp.zeros(shape[-1]), jnp.full(shape[-1], 15.0), "int4")
    sent = wire.encode(jnp.asarray(codes), "int4", scale)
    assert sent.nbytes == 2 * wire.nbytes(codes[0].size, "int4")
    np.testing.assert_array_equal(wire.decode(sent, "int4", codes, scale), codes)


@pytest.mark.parametrize("wire_dtype", ["float32", *WIRES[:4]])
def test_what_has_arrived_is_what_is_sent_and_read(wire_dtype):
    """Emulated nodes send nothing: they read the codes, without packing them."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 7)), jnp.float32)
    scale = None
    if wire.calibrated(wire_dtype):
        scale = wire.scale(jnp.full(7, -1.0), jnp.full(7, 1.0), wire_dtype)  # some are clipped
    read = wire.decode(wire.encode(x, wire_dtype, scale), wire_dtype, x, scale)
    np.testing.assert_array_equal(wire.arrived(x, wire_dtype, scale), read)
    np.testing.assert_array_equal(wire.arrived(x, None), x)


def test_int4_puts_two_channels_in_a_byte():
    layer = dj.layers.Dense(6, 6, mesh=dj.NodeMesh(2, emulate=False), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 6)), jnp.float32)
    frozen = dj.freeze(layer, x, wire_dtype="int4")
    assert frozen.plan.traffic_bytes == 2 * 2  # three channels in two bytes, both ways
    dj.verify(frozen, x)
    maps = dj.layers.Conv(6, 6, (3, 3), mesh=layer.mesh, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 6)), jnp.float32)
    frozen = dj.freeze(maps, x, wire_dtype="int4")
    assert frozen.plan.traffic_bytes == 2 * 16 * 3 // 2  # nothing is wasted on odd widths
    dj.verify(frozen, x)


def test_clipping_beats_the_full_range_where_codes_are_few():
    x = np.random.default_rng(0).standard_t(3, size=(4096, 2)).astype(np.float32)
    layer = dj.layers.Dense(2, 2, mesh=dj.NodeMesh(2, emulate=True), rngs=nnx.Rngs(0))
    dj.sparsify.quantise(layer, jnp.asarray(x), "int4")
    chosen = layer.exchange.scale[...]
    full = wire.scale(x.min(0), x.max(0), "int4")
    errors = [np.square(wire.rounded(x, "int4", s) - x).mean() for s in (chosen, full)]
    assert errors[0] < 0.5 * errors[1]


def test_gradients_pass_through_rounding():
    """Own weights see what was computed, remote ones what arrives; what is clipped learns not."""
    layer = dense(4)
    scale = np.stack([np.zeros(4), np.full(4, 1 / 15)]).astype(np.float32)
    layer.exchange.round_to("int4", scale)
    x, kernel = jnp.asarray([[0.51, 0.3, 2.0, 0.93]]), layer.kernel[...]
    arrives = wire.rounded(x, "int4", jnp.asarray(scale))
    call = of_kernel(layer)
    by_kernel, by_x = jax.grad(lambda k, x: call(k, x).sum(), (0, 1))(kernel, x)
    own = np.repeat(owned(4, 2).T, 2, axis=1)
    close(by_kernel, np.where(own, np.asarray(x).T, np.asarray(arrives).T), 1e-6)
    reaches = np.where(own, 1.0, (np.asarray(x) <= 1).T)
    close(by_x[0], (np.asarray(kernel) * reaches).sum(1), 1e-6)


def test_dropped_weights_have_the_gradient_of_what_would_arrive():
    layer = dense(4)
    dj.sparsify.allow_regrowth(layer)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
    dj.sparsify.quantise(layer, x, "int4")
    found = []
    for mask in (owned(4, 2), layer.exchange.full_mask()):
        layer.exchange.set_mask(jnp.asarray(mask))
        call = of_kernel(layer)
        found.append(jax.grad(lambda k, call=call: call(k, x).sum())(layer.kernel[...]))
    close(*found, 1e-6)


def test_training_recovers_what_rounding_costs():
    """Least squares towards the exact layer: better weights make int4's error smaller."""
    layer = dense(8)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(256, 8)), jnp.float32)
    right = layer(x)
    layer.exchange.round_to("int4", np.stack([np.full(8, -1.0), np.full(8, 2 / 15)]))
    call = of_kernel(layer)
    loss = jax.jit(jax.value_and_grad(lambda kernel: jnp.mean((call(kernel, x) - right) ** 2)))
    kernel = layer.kernel[...]
    first, _ = loss(kernel)
    for _ in range(50):
        kernel = kernel - 0.3 * loss(kernel)[1]
    assert loss(kernel)[0] < 0.8 * first


@pytest.mark.parametrize(
    ("wire_dtype", "message"),
    [
        ("int3", r"`wire_dtype` \(='int3'\) must be one of .*int4"),
        ([("conv2", "int4"), ("0.conv2", "int8")], r"`wire_dtype` entry '0.conv2' is not used"),
    ],
)
def test_wrong_wires_are_refused(wire_dtype, message):
    model = resnet(dj.NodeMesh(2, emulate=True))
    with pytest.raises(DiscoError, match=message):
        dj.sparsify.quantise(model, images(), wire_dtype)
    assert all(e.wire_dtype is None for e in exchanges(model).values())
