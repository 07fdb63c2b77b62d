"""No hidden communication: compiled collectives, their shapes and the plan say the same."""

import gc
import json
import re
import weakref
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, random_mask, random_masks

import disco_jax as dj
from disco_jax.partition import owned
from disco_jax.plan import CommunicationPlan, collectives
from disco_jax.plan.freeze import plan_hops, readable_channels
from disco_jax.plan.hlo import Collective


@pytest.mark.parametrize("nodes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_resnet50(nodes):
    """Full size: collectives and bytes equal the plan's, to the byte; silence at density 0."""
    mesh = dj.NodeMesh(nodes, emulate=False)
    model = dj.models.create("resnet50", mesh=mesh, rngs=nnx.Rngs(0))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    dj.sparsify.prune(model, 0.2)
    frozen = dj.freeze(model, images)
    found = dj.verify(frozen, images)
    assert len(found) == 49 * (nodes - 1)
    assert {c.kind for c in found} == {"collective-permute"}
    assert sum(c.traffic_bytes for c in found) == frozen.plan.traffic_bytes
    assert frozen.plan.dense_traffic_bytes >= 5.0 * frozen.plan.traffic_bytes
    dj.sparsify.prune(model, 0.0)
    silent = dj.freeze(model, images)
    assert dj.verify(silent, images) == ()
    assert silent.plan.traffic_bytes == 0


def test_resnet50_arithmetic():
    """The paper's arithmetic on two nodes: 5x less traffic, 0.61 of the work, 0.32 of weights."""
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create("resnet50", mesh=mesh, rngs=nnx.Rngs(0))
    dj.sparsify.prune(model, 0.2)
    plan = dj.freeze(model, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)).plan
    assert plan.dense_traffic_bytes >= 5.0 * plan.traffic_bytes
    assert plan.macs_per_node * 2 <= 0.61 * plan.single_node_macs
    assert plan.weight_bytes_per_node <= 0.32 * plan.single_node_weight_bytes
    assert plan.single_node_macs == 4_089_184_256  # as the literature counts ResNet-50
    assert plan.single_node_weight_bytes == 4 * (25_557_032 - 26_560)  # norms folded: a bias each


@pytest.mark.parametrize("nodes", [2, 3, 8])
def test_uneven_masks(nodes):
    """Nodes that read nothing send no message, and fill is counted as what it is: bytes."""
    mesh = dj.NodeMesh(nodes, emulate=False)
    model = dj.models.create("resnet8", mesh=mesh, num_classes=10, width=8, rngs=nnx.Rngs(0))
    random_masks(model, 0.5)
    dj.verify(dj.freeze(model, jnp.zeros((2, 32, 32, 3))), jnp.zeros((2, 32, 32, 3)))


WIRES = {
    "float32": (4, 1e-6),
    "float16": (2, 1e-3),
    "bfloat16": (2, 1e-2),
    "int8": (1, 1e-2),
    "int4": (0.5, 0.2),
}


@pytest.mark.parametrize("wire_dtype", WIRES)
def test_wire_dtypes_really_travel(wire_dtype):
    mesh = dj.NodeMesh(2, emulate=False)
    layer = dj.layers.Conv(8, 8, (3, 3), mesh=mesh, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 6, 8)), jnp.float32)
    frozen = dj.freeze(layer, x, wire_dtype=wire_dtype)
    assert frozen.plan.traffic_bytes == 6 * 6 * 8 * WIRES[wire_dtype][0]
    dj.verify(frozen, x)
    emulated = dj.freeze(layer, x, wire_dtype=wire_dtype, mesh=dj.NodeMesh(2, emulate=True))
    close(frozen(x), emulated(x), 1e-5)
    close(frozen(x), layer(x), WIRES[wire_dtype][1])


@pytest.mark.parametrize("wire_dtype", ["float32", "float16", "int4"])
@pytest.mark.parametrize("rows", [(), ("^conv$", r"blocks\.0"), ("",)])
def test_large_messages_go_in_pieces(wire_dtype, rows, tmp_path):
    """A channel, a row or the logits can be larger than a message: every one is cut."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    mesh = dj.NodeMesh(3, emulate=False)
    model = dj.models.create("resnet8", mesh=mesh, num_classes=10, width=8, rngs=nnx.Rngs(0))
    dj.split(model, x, rows)
    random_masks(model, 0.6)
    whole = dj.freeze(model, x, wire_dtype=wire_dtype)
    pieces = dj.freeze(model, x, wire_dtype=wire_dtype, message_bytes=16)
    sizes = [size for e in pieces.plan.exchanges for size, _ in e.rounds(3)]
    assert max(sizes) > 16
    assert pieces.plan.collectives == sum(-(-size // 16) for size in sizes)
    assert pieces.plan.collectives > whole.plan.collectives
    np.testing.assert_array_equal(pieces(x), whole(x))
    assert rows or pieces(x[:0]).shape == (0, 10)
    found = dj.verify(pieces, x)
    assert max(c.result_bytes for c in found) == 2 * 16  # of two images
    pieces.save(tmp_path)
    dj.verify(dj.load(tmp_path, mesh), x)


class Windows(nnx.Module):
    """A plain model: windows in the batch, a layer norm, a result of all channels."""

    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(8, 10, rngs=rngs), nnx.LayerNorm(10, rngs=rngs)
        self.second = nnx.Linear(10, 7, rngs=rngs)

    def __call__(self, x):
        windows = self.norm(self.first(x)).reshape(-1, 2, 10)
        found = jnp.sort(self.second(nnx.relu(windows)), -1)
        return found.reshape(x.shape[0], -1, 7)


@pytest.mark.parametrize("wire_dtype", [None, "int4"])
def test_pieces_of_a_model_that_folds_axes_into_the_batch(wire_dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
    model = dj.distribute(Windows(nnx.Rngs(0)), dj.NodeMesh(3, emulate=False), x)
    whole = dj.freeze(model, x, wire_dtype=wire_dtype)
    pieces = dj.freeze(model, x, wire_dtype=wire_dtype, message_bytes=np.int64(16))
    assert pieces.plan == CommunicationPlan.from_json(pieces.plan.to_json())
    assert sum(e.gathered > 0 for e in pieces.plan.exchanges) == 2  # statistics, result
    found = dj.verify(pieces, x)
    assert max(c.result_bytes for c in found) == 2 * 16  # of two images
    np.testing.assert_array_equal(pieces(x), whole(x))


def test_rounds_are_the_pairs_of_the_program():
    conv = dj.layers.Conv(6, 6, (3, 3), mesh=dj.NodeMesh(3, emulate=False), rngs=nnx.Rngs(0))
    head = dj.Gather(6, mesh=conv.mesh, always=True)
    x = jnp.ones((1, 4, 4, 6))
    frozen = dj.freeze(nnx.Sequential(conv, head), x)
    text = frozen.lower(x).compile().as_text()
    found = re.findall(r"source_target_pairs=\{(\{.*?\})\}", text)
    planned = [pairs for e in frozen.plan.exchanges for _, pairs in e.rounds(3)]
    written = [",".join(f"{{{a},{b}}}" for a, b in pairs) for pairs in planned]
    assert sorted(found) == sorted(written)
    assert len(set(found)) == 2


@pytest.mark.parametrize("size", [0, -8, 12, 16.0, "16"])
def test_refused_size_of_messages_in_a_plan(size):
    text = CommunicationPlan(2, (), ()).to_json().replace("null", json.dumps(size))
    with pytest.raises(dj.DiscoError, match=rf"`message_bytes` \(={size!r}\)"):
        CommunicationPlan.from_json(text)


@pytest.mark.parametrize("size", [0, -8, 12, 16.0])
def test_refused_size_of_messages(size):
    model = dj.models.create("resnet8", mesh=dj.NodeMesh(2, emulate=True), rngs=nnx.Rngs(0))
    with pytest.raises(dj.DiscoError, match=rf"`message_bytes` \(={size}\)"):
        dj.freeze(model, jnp.zeros((1, 8, 8, 3)), message_bytes=size)


@pytest.mark.parametrize("nodes", [2, 3])
def test_own_channels_need_not_wait_for_others(nodes, monkeypatch):
    """The form for accelerators: own and received channels are multiplied apart."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    mesh = dj.NodeMesh(nodes, emulate=False)
    model = dj.models.create("resnet8", mesh=mesh, num_classes=10, width=8, rngs=nnx.Rngs(0))
    random_masks(model, 0.5)
    frozen = dj.freeze(model, x, wire_dtype="int8")
    fused = frozen(x)
    monkeypatch.setattr(dj.NodeMesh, "overlaps", property(lambda mesh: mesh.distributed))
    apart = dj.plan.Frozen(frozen.model, frozen.plan)
    close(apart(x), fused, 1e-5)
    dj.verify(apart, x)
    convolutions = [f.lower(x).as_text().count("stablehlo.convolution") for f in (apart, frozen)]
    assert convolutions[0] > convolutions[1]


@pytest.mark.parametrize("nodes", [2, 4])
def test_int8_travels_within_half_a_step(nodes):
    """Uneven masks: every node reads its own channels exactly, others to half a step."""
    mesh = dj.NodeMesh(nodes, emulate=False)
    layer = dj.layers.Dense(16, 16, mesh=mesh, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    layer.exchange.set_mask(random_mask(layer.exchange, 0.5))
    x = jnp.asarray(rng.normal(size=(64, 16)) * rng.uniform(0.01, 10, 16), jnp.float32)
    frozen = dj.freeze(layer, x, wire_dtype="int8")
    dj.verify(frozen, x)
    mask = np.asarray(layer.exchange.mask[...])
    step = (np.ptp(x, axis=0) / 255) * ~owned(16, nodes) * mask
    kernel = np.abs(np.asarray(layer.kernel[...]))
    bound = np.einsum("nc,cno->no", step / 2, kernel.reshape(16, nodes, -1)).ravel()
    error = np.abs(np.asarray(frozen(x)) - np.asarray(layer(x)))
    assert (error <= bound * 1.01 + 1e-5).all()
    assert error.max() > bound.max() / 100  # something was rounded


class Everything(nnx.Module):
    """Node-local operations of all kinds, and the two exchanges without a mask."""

    def __init__(self, mesh):
        self.mesh = mesh
        rngs = nnx.Rngs(0)
        self.conv = dj.layers.Conv(16, 32, (3, 3), mesh=mesh, rngs=rngs)
        self.depthwise = dj.layers.Conv(
            32, 32, (3, 3), mesh=mesh, feature_group_count=32, rngs=rngs
        )
        self.batch_norm = dj.layers.BatchNorm(32, mesh=mesh, rngs=rngs)
        self.group_norm = dj.layers.GroupNorm(32, 8, mesh=mesh, rngs=rngs)
        self.layer_norm = dj.layers.LayerNorm(32, mesh=mesh, rngs=rngs)
        self.local_norm = dj.layers.LayerNorm(32, mesh=mesh, scope="node", rngs=rngs)
        self.dense = dj.layers.Dense(8 * 9 * 2, 10, mesh=mesh, pad=True, rngs=rngs)
        self.gather = dj.Gather(10, mesh=mesh)

    def __call__(self, x):
        layers, mesh = dj.layers, self.mesh
        x = self.group_norm(self.batch_norm(self.depthwise(self.conv(x))))
        x = self.local_norm(self.layer_norm(x))
        first, second = layers.split(x, 2, mesh=mesh)
        x = layers.concat([first, layers.max_pool(second, (1, 1))], mesh=mesh)
        x = layers.pixel_shuffle(x, 2, mesh=mesh)
        x = layers.avg_pool(x, (2, 2), (2, 2))
        x = layers.flatten(layers.concat([x, x], mesh=mesh), mesh=mesh)
        return self.gather(self.dense(x))


@pytest.mark.parametrize("nodes", [2, 4])
def test_everything_else_is_local(nodes):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 16)), jnp.float32)
    outputs = []
    for emulate in (False, True):
        mesh = dj.NodeMesh(nodes, emulate=emulate)
        model = Everything(mesh)
        random_masks(model, 0.5)
        frozen = dj.freeze(model, x)
        outputs += [frozen(x), dj.plan.Program(model)(x)]
        if not emulate:
            dj.verify(frozen, x)
            by_path = {e.path: e for e in frozen.plan.exchanges}
            assert set(by_path) == {
                "conv.exchange",
                "layer_norm.statistics",
                "dense.exchange",
                *(["gather"] if 10 % nodes else []),
            }
            pairs = nodes * (nodes - 1)
            assert by_path["layer_norm.statistics"].traffic_bytes(nodes) == 2 * 4 * 9 * pairs
    for output in outputs[1:]:
        assert output.shape == (2, 10)
        close(output, outputs[0], 1e-5)


class Shared(nnx.Module):
    """Two readers of one tensor."""

    def __init__(self, mesh):
        self.exchange = dj.Exchange(8, mesh=mesh)
        self.a = dj.layers.Dense(8, 8, exchange=self.exchange, rngs=nnx.Rngs(0))
        self.b = dj.layers.Dense(8, 8, exchange=self.exchange, rngs=nnx.Rngs(1))

    def __call__(self, x):
        readable = self.exchange(x)
        return self.a(readable) + self.b(readable)


class Reread(Shared):
    """Each layer reads the tensor by itself; it is one tensor all the same."""

    def __call__(self, x):
        return self.a(x) + self.b(x)


class Twice(Shared):
    """Two tensors through one exchange."""

    def __call__(self, x):
        return self.a(x) + self.b(2 * x)


def test_shared_exchange_is_paid_once():
    mesh = dj.NodeMesh(2, emulate=False)
    x = jnp.ones((1, 5, 8))
    once, reread, twice = (dj.freeze(kind(mesh), x) for kind in (Shared, Reread, Twice))
    assert len(dj.verify(once, x)) == 1
    assert once.plan.exchanges[0].consumers == ("a", "b")
    assert len(dj.verify(reread, x)) == 1
    assert len(dj.verify(twice, x)) == 2
    assert twice.plan.traffic_bytes == 2 * once.plan.traffic_bytes
    close(once(x), reread(x), 1e-6)


def test_verify_finds_a_collective_that_the_plan_lacks():
    class Hidden(nnx.Module):
        def __init__(self, mesh):
            self.dense = dj.layers.Dense(8, 8, mesh=mesh, rngs=nnx.Rngs(0))

        def __call__(self, x):
            y = self.dense(x)
            return y / y.sum(-1, keepdims=True)  # a sum over all nodes

    frozen = dj.freeze(Hidden(dj.NodeMesh(2, emulate=False)), jnp.ones((1, 8)))
    with pytest.raises(dj.DiscoError, match="collectives moving"):
        dj.verify(frozen, jnp.ones((1, 8)))


def test_a_layer_under_a_transform_of_flax_is_refused():
    class Compiled(nnx.Module):
        def __init__(self):
            self.dense = dj.layers.Dense(8, 8, mesh=dj.NodeMesh(2), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.jit(lambda dense, x: dense(x))(self.dense, x)

    with pytest.raises(dj.DiscoError, match="copy of its Exchange"):
        dj.freeze(Compiled(), jnp.ones((1, 8)))


def test_a_program_is_freed_with_its_last_reference():
    program = dj.plan.Program(dj.layers.Dense(8, 8, mesh=dj.NodeMesh(2), rngs=nnx.Rngs(0)))
    gone = weakref.ref(program)
    gc.disable()
    try:
        del program
        assert gone() is None
    finally:
        gc.enable()


class Loop(nnx.Module):
    """The same layer five times in a compiled loop."""

    def __init__(self, mesh):
        self.dense = dj.layers.Dense(8, 8, mesh=mesh, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jax.lax.fori_loop(0, 5, lambda _, x: self.dense(x), x)


@pytest.mark.parametrize("message_bytes", [None, 8])
def test_verify_counts_every_turn_of_a_loop(message_bytes):
    """The pieces of a message are a loop within that loop."""
    x = jnp.ones((1, 8))
    model = Loop(dj.NodeMesh(2, emulate=False))
    frozen = dj.freeze(model, x, message_bytes=message_bytes)
    found = collectives(frozen.lower(x).compile())
    assert sum(c.traffic_bytes for c in found) == 5 * frozen.plan.traffic_bytes
    count = frozen.plan.collectives
    error = rf"has {5 * count} collectives moving 160 .* {count} moving 32"
    with pytest.raises(dj.DiscoError, match=error):
        dj.verify(frozen, x)


class Repeated(nnx.Module):
    def __init__(self, mesh):
        self.dense = dj.layers.Dense(8, 8, mesh=mesh, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.dense(self.dense(x))


def test_a_layer_called_twice_has_its_weights_once():
    plan = dj.freeze(Repeated(dj.NodeMesh(2)), jnp.ones((1, 8))).plan
    assert plan.single_node_weight_bytes == 4 * 64
    assert plan.single_node_macs == 2 * 64


def test_dead_channels_do_not_flatter_the_ratios():
    def plan(nodes):
        conv = dj.layers.Conv(
            64, 64, (3, 3), mesh=dj.NodeMesh(nodes), pad=True, use_bias=False, rngs=nnx.Rngs(0)
        )
        channels = conv.exchange.channels
        return dj.freeze(conv, jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float32)).plan

    two, three = plan(2), plan(3)
    assert two.single_node_macs == three.single_node_macs == 64 * 9 * 64 * 64
    assert two.single_node_weight_bytes == three.single_node_weight_bytes == 4 * 9 * 64 * 64
    assert (two.dense_traffic_bytes, three.dense_traffic_bytes) == (4 * 64 * 64, 4 * 64 * 2 * 64)


def test_bfloat16_results_and_statistics_travel_as_planned():
    class Head(nnx.Module):
        def __init__(self, mesh):
            kwargs = {"mesh": mesh, "pad": True, "dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
            self.norm = dj.layers.LayerNorm(8, **kwargs)
            self.dense = dj.layers.Dense(8, 10, **kwargs)
            self.gather = dj.Gather(10, mesh=mesh)

        def __call__(self, x):
            return self.gather(self.dense(self.norm(x)))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8)), jnp.bfloat16)
    frozen = dj.freeze(Head(dj.NodeMesh(4, emulate=False)), x)
    dj.verify(frozen, x)
    assert frozen(x).dtype == jnp.bfloat16


def test_trace_computes_nothing():
    model = dj.models.create("resnet50", mesh=dj.NodeMesh(2), rngs=nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(model))
    traced = dj.trace(model, jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert len(traced.exchanges) == 49
    assert len(traced.layers) == 54
    first = traced.exchanges[0]
    assert (first.path, first.shape, first.dtype) == (
        "blocks.0.exchange",
        (1, 56, 56, 64),
        "float32",
    )
    assert first.consumers == ("blocks.0.conv1", "blocks.0.projection")
    assert all(a is b for a, b in zip(before, jax.tree.leaves(nnx.state(model)), strict=True))


def test_plan_round_trips_and_prints():
    model = dj.models.create("resnet20", mesh=dj.NodeMesh(4), num_classes=10, rngs=nnx.Rngs(0))
    dj.sparsify.prune(model, 0.2)
    plan = dj.freeze(model, jnp.zeros((1, 32, 32, 3))).plan
    assert CommunicationPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["version"] == 4
    assert "blocks.8.conv2.exchange" in str(plan)
    assert f"{plan.traffic_bytes:,}" in str(plan)


def test_readable_channels_follow_the_mask():
    mask = np.asarray(random_mask(dj.Exchange(12, mesh=dj.NodeMesh(4)), 0.4)) | owned(12, 4)
    readable = readable_channels(plan_hops(mask), 4, 12)
    for row, wanted in zip(readable, mask, strict=True):
        assert sorted(c for c in row if c >= 0) == np.flatnonzero(wanted).tolist()


class TestHlo:
    """The parser on lines of the forms that XLA prints."""

    LINES: ClassVar = {
        "%p = f32[1,4,2]{2,1,0} collective-permute(%x), channel_id=1, "
        "source_target_pairs={{0,1},{1,0}}, metadata={}": Collective(
            "collective-permute", 32, 2, 64
        ),
        "%s = (u16[8]{0}, u16[8]{0}, u32[], u32[]) collective-permute-start(%x), "
        "source_target_pairs={{0,1}}": Collective("collective-permute", 16, 1, 16),
        "%g = s8[4,6]{1,0} all-gather(%x), replica_groups={{0,1},{2,3}}, dimensions={1}": (
            Collective("all-gather", 24, 4, 48)
        ),
        "%r = (f32[], f32[3]{0}) all-reduce(%a, %b), replica_groups=[1,4]<=[4]": Collective(
            "all-reduce", 16, 12, 192
        ),
        "%m = f32[4] all-reduce(%a), replica_groups=mesh['x'=3,'y'=2] {'y'}, to_apply=%f": (
            Collective("all-reduce", 16, 6, 96)
        ),
    }

    def test_lines(self):
        for line, expected in self.LINES.items():
            assert collectives(line) == (expected,)

    def test_loops(self):
        line = next(iter(self.LINES))
        trips = ', backend_config={"known_trip_count":{"n":"%d"}}'
        inner, outer = (f" while(%t), condition=%c, body=%{body}" for body in ("in", "out"))
        text = f"""
%in (x: f32[]) -> f32[] {{
  {line}
}}
%out (x: f32[]) -> f32[] {{
  %w = f32[]{inner}{trips % 3}
}}
ENTRY %main (x: f32[]) -> f32[] {{
  %v = f32[]{outer}{trips % 5}
  {line}
}}"""
        assert collectives(text) == 16 * (self.LINES[line],)
        with pytest.raises(dj.DiscoError, match="number of turns is not known"):
            collectives(text.replace(trips % 5, ""))

    def test_nothing_else(self):
        assert collectives("%d = f32[2] collective-permute-done(%s)\n%a = f32[2] add(%b, %c)") == ()
