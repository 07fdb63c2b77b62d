"""Maps split by rows: every exchange and layer equals the plain one, on devices and emulated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, meshes, random_mask

import disco_jax as dj
from disco_jax.bands import Bands
from disco_jax.partition import pad_axis
from disco_jax.plan.freeze import pack_kernel, plan_hops, readable_channels
from disco_jax.rows import ChannelsToRows, HaloExchange, ReplicatedRows, RowsToChannels

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
    bands = Bands(x.shape[1], mesh.nodes)
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
        reads = layer._rows(height).reads(height, nodes)
        for kind, given in (
            (ReplicatedRows, x),
            (HaloExchange, banded(x, mesh)),
            (ChannelsToRows, x),
        ):
            layer.exchange = kind(inner, height, reads, wire_dtype="float64")
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
        layer.exchange = RowsToChannels(masked.exchange, height, readable, wire_dtype="float64")
        y, found = counted(lambda x, layer=layer: layer(x), banded(x, mesh))
        close(y, expected, FLOAT64)
        if mesh.distributed:
            size = 2 * Bands(height, nodes).size * 6 * readable.shape[1] * 8
            assert sum(c.traffic_bytes for c in found) == nodes * (nodes - 1) * size
            assert len(found) == nodes - 1
