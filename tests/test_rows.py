"""Maps split by rows: every exchange and layer equals the plain one, on devices and emulated."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import carry_over, close, error, meshes, random_mask, randomize

import disco_jax as dj
from disco_jax.bands import Bands, Reads
from disco_jax.exchange import Local
from disco_jax.partition import pad_axis
from disco_jax.plan.freeze import pack_kernel, plan_hops, readable_channels
from disco_jax.repartition import RowsToChannels
from disco_jax.rows import ChannelsToRows, HaloExchange, ReplicatedRows
from disco_jax.trace import exchanges

FLOAT64 = 1e-10
NODES = (pytest.param(1, marks=pytest.mark.slow), 2, 3, pytest.param(4, marks=pytest.mark.slow))
WINDOWS = {
    "3x3": {"kernel_size": (3, 3)},
    "stride 2": {"kernel_size": (3, 3), "strides": 2},
    "stem": {"kernel_size": (7, 7), "strides": 2, "padding": 3},
    "dilated": {"kernel_size": (3, 3), "kernel_dilation": 4, "padding": 4},
    "projection": {"kernel_size": (1, 1), "strides": 2},
    "even": {"kernel_size": (2, 2), "strides": 2, "padding": "VALID"},
    "depthwise": {"kernel_size": (3, 3), "feature_group_count": 12},
}


def banded(x, mesh):
    """As a map split by rows lies in memory; dead rows hold what must not be read."""
    bands = Bands.equal(x.shape[1], mesh.nodes)
    wide = pad_axis(x, bands.size * mesh.nodes, 1)
    dead = jnp.arange(wide.shape[1]) >= x.shape[1]
    wide = jnp.where(dead[:, None, None], jnp.nan, wide)
    return mesh.put(wide, None, "node") if mesh.distributed else wide


def counted(fn, *args):
    """What it gives, and how many collectives it has."""
    compiled = jax.jit(fn).lower(*args).compile()
    found = dj.plan.collectives(compiled)
    assert {c.kind for c in found} <= {"collective-permute"}
    return compiled(*args), found


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("height", [1, 8, 13])
@pytest.mark.parametrize("name", WINDOWS)
def test_a_convolution(name, height, nodes, x64):
    """From replicated rows, from bands, and from channels, to the plain layer."""
    options = WINDOWS[name]
    plain = nnx.Conv(12, 24, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, 6, 12)))
    if height < 2 and name == "even":
        return
    expected = plain(x)
    for mesh in meshes(nodes):
        inner = dj.exchange.Replicated(12, mesh=mesh)
        layer = dj.layers.Conv(
            12, 24, **options, mesh=mesh, pad=True, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        layer.kernel.set_value(mesh.put(plain.kernel[...]))
        layer.bias.set_value(mesh.put(plain.bias[...]))
        reads = layer.rows(height).reads(height, nodes)
        for kind, given in (
            (ReplicatedRows, x),
            (HaloExchange, banded(x, mesh)),
            (ChannelsToRows, x),
        ):
            layer.exchange = kind(inner, Bands.equal(height, nodes), reads, wire_dtype="float64")
            y, found = counted(lambda x, layer=layer: layer(x), given)
            close(y[:, : expected.shape[1]], expected, FLOAT64)
            assert y.shape[1] % nodes == 0
            hops = layer.exchange.hops
            assert len(found) == len(hops) * mesh.distributed
            if mesh.distributed:
                width = 6 * 12 // (nodes if kind is ChannelsToRows else 1)
                bytes_ = sum(h.width * len(h.pairs) for h in hops) * width * 2 * 8
                assert sum(c.traffic_bytes for c in found) == bytes_


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("height", [1, 7])
def test_rows_to_channels(nodes, height, x64):
    """A masked layer behind bands is the masked layer; readable channels alone move."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, 6, 12)))
    for mesh in meshes(nodes):
        masked = dj.layers.Conv(
            12, 24, (3, 3), mesh=mesh, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        mask = random_mask(masked.exchange, 0.5)
        masked.exchange.set_mask(mask)
        expected = masked(x)
        readable = readable_channels(plan_hops(np.asarray(masked.exchange.mask[...])), nodes, 12)
        layer = nnx.clone(masked)
        layer.kernel = nnx.Param(mesh.put(pack_kernel(masked.kernel[...], readable), "node"))
        layer.exchange = RowsToChannels(
            masked.exchange, Bands.equal(height, nodes), readable, wire_dtype="float64"
        )
        y, found = counted(lambda x, layer=layer: layer(x), banded(x, mesh))
        close(y, expected, FLOAT64)
        if mesh.distributed:
            size = 2 * Bands.equal(height, nodes).size * 6 * readable.shape[1] * 8
            assert sum(c.traffic_bytes for c in found) == nodes * (nodes - 1) * size
            assert len(found) == nodes - 1


# Options, size of the images, and patterns of the layers that are split by rows.
NETWORKS = {
    "resnet50": ({"width": 8, "num_classes": 5}, (65, 48), ["^conv$", r"blocks\.[0-6]\."]),
    "resnet8": ({"width": 8}, (9, 8), [""]),
    "deeplabv3_resnet18": (
        {"width": 8, "head_width": 12},
        (49, 40),
        [r"blocks\.[0-3]\.", "backbone.conv"],
    ),
    "lraspp_resnet18": ({"width": 8}, (64, 40), [r"blocks\.[0-3]\.", "backbone.conv"]),
    "edsr": ({"width": 8, "depth": 2, "scale": 4}, (11, 8), [""]),
    "rcan": ({"width": 12, "groups": 1, "depth": 1, "reduction": 4, "parts": True}, (7, 8), [""]),
    "mobilenet_v2": (
        {"stages": ((1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 2, 2)), "num_classes": 5},
        (65, 48),
        ["^stem$", r"blocks\.[0-2]\."],
    ),
    "vgg16": ({"width": 4, "hidden": 8}, (230, 224), [r"convs\.\d$"]),
}


SMALL = ("resnet8", "edsr", "rcan")
QUICK = [(name, 2) for name in SMALL] + [(name, 3) for name in NETWORKS if name != "resnet50"]
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
    for case in itertools.product(NETWORKS, (2, 3, 4))
]


@pytest.mark.parametrize(("name", "nodes"), CASES)
def test_a_network_with_mixed_splits(name, nodes, x64, tmp_path):
    """Packed = masked = the plain network but for late masks; nothing else communicates."""
    options, size, rows = NETWORKS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *size, 3)))
    alone = dj.NodeMesh(1, emulate=True)
    plain = dj.models.create(name, mesh=alone, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
    randomize(plain)
    for mesh in meshes(nodes):
        model, whole = (
            dj.models.create(name, mesh=m, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
            for m in (mesh, dj.NodeMesh(nodes, emulate=True))
        )
        carry_over(plain, model), carry_over(plain, whole)
        dj.split(model, x, rows)
        masks = {p: random_mask(e, 0.5, i) for i, (p, e) in enumerate(exchanges(model).items())}
        for masked in (model, whole):
            masked.eval()
            for path, mask in masks.items():
                exchanges(masked)[path].set_mask(mask)
        expected = dj.plan.Program(whole)(x)
        close(dj.plan.Program(model)(x), expected, FLOAT64)
        frozen = dj.freeze(model, x)
        close(frozen(x), expected, FLOAT64)
        if mesh.distributed:
            dj.verify(frozen, x)
        frozen.save(tmp_path / str(mesh.distributed))
        loaded = dj.load(tmp_path / str(mesh.distributed), mesh)
        close(loaded(x), expected, FLOAT64)


class UNet(nnx.Module):
    """Two scales, the coarse one enlarged and put beside the fine one."""

    def __init__(self, mesh):
        conv = partial(
            dj.layers.Conv, kernel_size=(3, 3), mesh=mesh, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        self.fine, self.coarse = conv(12, 12), conv(12, 24)
        self.pool = dj.layers.MaxPool((3, 3), (2, 2), "SAME", mesh=mesh)
        self.enlarge, self.concat = dj.layers.Resize(mesh=mesh), dj.layers.Concat(mesh=mesh)
        self.head = conv(36, 12)

    def __call__(self, x):
        fine = nnx.relu(self.fine(x))
        coarse = nnx.relu(self.coarse(self.pool(fine)))
        return self.head(self.concat([fine, self.enlarge(coarse, fine.shape[1:3])]))


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("rows", [["^fine$", "^coarse$"], [""]])
def test_interpolation_and_concatenation(rows, nodes, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 13, 6, 12)))
    for mesh in meshes(nodes):
        model, whole = UNet(mesh), UNet(dj.NodeMesh(nodes, emulate=True))
        dj.split(model, x, rows)
        for path, exchange in exchanges(model).items():
            exchange.set_mask(random_mask(exchange, 0.5))
            exchanges(whole)[path].set_mask(random_mask(exchange, 0.5))
        expected = whole(x)
        frozen = dj.freeze(model, x)
        close(frozen(x)[:, :13], expected, FLOAT64)
        assert {e.split for e in frozen.plan.exchanges if e.hops} >= (
            {"rows"} if nodes > 1 else set()
        )
        if mesh.distributed:
            dj.verify(frozen, x)


@pytest.mark.parametrize("rows", [["^conv$", r"blocks\.[0-2]\."], [""]])
@pytest.mark.parametrize("emulate", [False, True])
def test_a_share_computes_its_rows(rows, emulate):
    """And as much as the plan says, which on one node is what the plain network does."""
    mesh, x = dj.NodeMesh(2, emulate=emulate), np.ones((1, 24, 24, 3), np.float32)
    model = dj.models.create("resnet20", mesh=mesh, rngs=nnx.Rngs(0))
    whole = dj.freeze(model, x).plan
    dj.split(model, x, rows)
    frozen = dj.freeze(model, x)
    assert frozen.plan.single_node_macs == whole.single_node_macs
    assert frozen.plan.macs_per_node == pytest.approx(whole.macs_per_node, rel=0.01)
    # Behind a pool of rows, which gives every node the mean, the head has nothing to exchange.
    assert frozen.plan.dense_traffic_bytes == whole.dense_traffic_bytes - 256 * (rows == [""])
    flops = dj.plan.share(frozen, 1).lower(x).cost_analysis()["flops"]
    assert flops / 2 == pytest.approx(frozen.plan.macs_per_node, rel=0.1)
    assert str(frozen.plan).count(" rows ") > 5


@pytest.mark.parametrize("wire_dtype", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_integers_from_rows_to_channels(wire_dtype, tmp_path):
    """Training rounds what the packed model rounds: own channels too, where they come in bands.

    In messages of a limited size.
    """
    x = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype(np.float32)
    for mesh in meshes(2):
        model = dj.models.create("resnet8", mesh=mesh, rngs=nnx.Rngs(0))
        randomize(model)
        model.eval()
        exact = model(x)
        dj.split(model, x, ["^conv$", r"blocks\.0"], wire_dtype="float16")
        dj.sparsify.quantise(model, x, wire_dtype)
        expected = model(x)
        assert error(expected, exact) > 1e-4
        frozen = dj.freeze(model, x, message_bytes=304)
        assert len(frozen.plan.exchanges[3].hops) >= 2
        frozen.save(tmp_path / str(mesh.distributed))
        loaded = dj.load(tmp_path / str(mesh.distributed), mesh)
        np.testing.assert_array_equal(loaded(x), frozen(x))
        if mesh.distributed:
            dj.verify(loaded, x)
        # Rows travel in float16, which makes another code of some numbers.
        close(frozen(x), expected, 2e-3 if wire_dtype == "int8" else 2e-2)
        dtypes = {e.split: e.wire_dtype for e in frozen.plan.exchanges if e.hops}
        assert dtypes == {"rows": "float16", "rows to channels": wire_dtype, "channels": wire_dtype}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["nowhere"], "`rows` entry 'nowhere' is found in no path of a layer"),
        ([r"blocks\.3\.conv2"], "must be split by rows as `blocks.3.conv2` is"),
        ([r"blocks\.3\.conv1"], "layers that share an exchange must be split alike"),
    ],
)
def test_what_cannot_be_split_by_rows(rows, message):
    mesh, x = dj.NodeMesh(2, emulate=True), jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    model = dj.models.create("resnet20", mesh=mesh, rngs=nnx.Rngs(0))
    with pytest.raises(dj.DiscoError, match=message):
        dj.split(model, x, rows)


class Summed(nnx.Module):
    """A sum down the rows, which is no module that knows of them."""

    def __init__(self, mesh):
        self.conv = dj.layers.Conv(4, 4, (3, 3), mesh=mesh, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jnp.cumsum(nnx.relu(self.conv(x)), 1)


def test_what_mixes_rows_is_not_split_by_them():
    model, x = Summed(dj.NodeMesh(2, emulate=True)), jnp.ones((1, 8, 8, 4))
    with pytest.raises(dj.DiscoError, match="`conv` computes cannot be split by rows: 'cumsum'"):
        dj.split(model, x, [""])


def test_images_of_another_height_are_refused():
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create("resnet8", mesh=mesh, rngs=nnx.Rngs(0))
    dj.split(model, jnp.ones((1, 32, 32, 3)), ["^conv$", r"blocks\.0"])
    frozen = dj.freeze(model, jnp.ones((1, 32, 32, 3)))
    assert frozen(jnp.ones((2, 32, 32, 3))).shape == (2, 1000)
    with pytest.raises(dj.DiscoError, match="`images` have another height than those"):
        frozen(jnp.ones((1, 40, 32, 3)))


def test_what_does_not_know_rows_says_so():
    mesh, x = dj.NodeMesh(2, emulate=True), jnp.ones((1, 16, 16, 3))
    model = dj.models.create("resnet8", mesh=mesh, rngs=nnx.Rngs(0))
    costs = dj.sparsify.wire_costs(model, x)
    dj.split(model, x, ["^conv$", r"blocks\.0"])
    late = dj.sparsify.wire_costs(model, x)
    assert late.keys() < costs.keys()
    assert {p for p in late if late[p] < costs[p]} == {"blocks.1.exchange"}
    with pytest.raises(dj.DiscoError, match="split by rows already; give all patterns at once"):
        dj.split(model, x, ["blocks.1"])
    with pytest.raises(dj.DiscoError, match="split by rows, which cannot be priced yet"):
        dj.cost.latency_budget(model, x, 10.0, dj.cost.Link(mbit=100, ms=0.1), gmacs=10)
    plain = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    with pytest.raises(dj.DiscoError, match=r"comes from dj\.distribute, which splits by channels"):
        dj.split(dj.distribute(plain, mesh, x), x, [""])


class Weighted(nnx.Module):
    """A map weighted by the mean of another one, which a node has a part of."""

    def __init__(self, mesh):
        conv = partial(dj.layers.Conv, 4, 4, (3, 3), mesh=mesh)
        self.conv, self.other = conv(rngs=nnx.Rngs(0)), conv(rngs=nnx.Rngs(1))
        self.mean = dj.layers.GlobalPool(keepdims=True, mesh=mesh)

    def __call__(self, x):
        return self.conv(x) * self.mean(self.other(x))


def test_rows_need_weights_that_every_node_has():
    x = jnp.ones((1, 8, 8, 4))
    model = Weighted(dj.NodeMesh(2, emulate=True))
    with pytest.raises(dj.DiscoError, match="`mean` computes is split by channels, and `conv` by"):
        dj.split(model, x, ["^conv"])
    expected = model(x)
    dj.split(model, x, [""])
    close(dj.freeze(model, x)(x), expected, 1e-6)


@pytest.mark.parametrize("reader", ["depthwise", "parts"])
def test_own_channels_are_not_read_of_rows(reader):
    mesh, rngs = dj.NodeMesh(2, emulate=True), nnx.Rngs(0)
    options = {
        "depthwise": {"feature_group_count": 4},
        "parts": {"exchange": dj.Parts(4, mesh=mesh)},
    }
    conv = partial(dj.layers.Conv, 4, 4, (3, 3), mesh=mesh, rngs=rngs)
    model = nnx.Sequential(conv(), conv(**options[reader]))
    with pytest.raises(dj.DiscoError, match=r"`layers.1` reads a node's own channels alone"):
        dj.split(model, jnp.ones((1, 7, 8, 4)), [r"layers\.0"])


@pytest.mark.parametrize("emulate", [False, True])
def test_the_mean_over_rows_does_not_overflow(emulate):
    mesh, height = dj.NodeMesh(2, emulate=emulate), 63
    pool, bands = dj.layers.GlobalPool(mesh=mesh), Bands.equal(height, 2)
    pool.split_by_rows(bands, 4)
    x = jnp.full((1, height, 64, 4), 30, jnp.float16)
    np.testing.assert_allclose(pool(banded(x, mesh)), np.full((1, 4), 30), rtol=2e-3)


class Pyramid(nnx.Module):
    """One head for maps of two heights."""

    def __init__(self, mesh):
        conv = partial(dj.layers.Conv, 4, 4, (3, 3), mesh=mesh, rngs=nnx.Rngs(0))
        self.fine, self.coarse, self.head = conv(), conv(strides=2), conv()
        self.mean = dj.layers.GlobalPool(mesh=mesh)

    def __call__(self, x):
        fine = self.fine(x)
        return self.mean(self.head(fine)) + self.mean(self.head(self.coarse(fine)))


def test_maps_of_two_heights_share_no_bands():
    model, x = Pyramid(dj.NodeMesh(2, emulate=True)), jnp.ones((1, 8, 8, 4))
    with pytest.raises(dj.DiscoError, match=r"has maps of \[4, 8\] rows, which have no bands"):
        dj.split(model, x, [""])


@pytest.mark.parametrize("height", [14, 13])
def test_blocks_with_rows_that_nobody_needs(height):
    """As where a projection of stride 2 reads a row less than what it shares its exchange with."""
    needed = (range(0, 7), range(7, height))
    reads, x = Reads((0, 7), 8, needed), np.random.default_rng(0).normal(size=(1, height, 3, 4))
    found = []
    for mesh in meshes(2):
        exchange = HaloExchange(Local(4, mesh=mesh), Bands.equal(height, 2), reads)
        found.append(np.asarray(exchange(banded(jnp.asarray(x, jnp.float32), mesh)).values))
    np.testing.assert_array_equal(*found)
    assert not found[0][0, 7].any()
