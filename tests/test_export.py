"""An exported program runs as docs/hosts.md says, with jax and numpy alone, and as planned."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import disco_jax as dj
from disco_jax.plan import collectives

HOSTS = Path(__file__).parents[1] / "docs" / "hosts.md"
HOST = """
import sys, numpy as np, jax
images, results, *job = sys.argv[1:]
if job:
    jax.distributed.initialize(job[0], int(job[1]), int(job[2]))
images = np.load(images)
{readme}
assert not {{"flax", "disco_jax"}} & set(sys.modules)
np.savez(results, **{{str(s.index[1].start or 0): s.data for s in logits.addressable_shards}})
"""


def images():
    return np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def frozen(wire_dtype=None, nodes=2, data=1, emulate=False, **kwargs):
    mesh = dj.NodeMesh(nodes, data, emulate=emulate)
    model = dj.models.create(
        "resnet8", mesh=mesh, num_classes=12, width=8, rngs=nnx.Rngs(0), **kwargs
    )
    dj.sparsify.prune(model, 0.5)
    return dj.freeze(model, images(), wire_dtype=wire_dtype)


def start(directory, results, *job, devices):
    """A process without disco_jax that does what docs/hosts.md says."""
    (lines,) = re.findall(r"```python\n([^`]*jax\.export[^`]*)```", HOSTS.read_text())
    code = HOST.format(readme=lines.replace('Path("exported")', "Path('.')"))
    np.save(directory.parent / "images.npy", images())
    return subprocess.Popen(
        [sys.executable, "-c", code, "../images.npy", str(results), *map(str, job)],
        cwd=directory,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
        stderr=subprocess.PIPE,
        text=True,
    )


def logits(hosts, files):
    for host in hosts:
        errors = host.communicate(timeout=300)[1]
        assert host.returncode == 0, errors
    shards = {int(k): v for file in files for k, v in np.load(file).items()}
    return np.concatenate([shards[k] for k in sorted(shards)], -1)


def close(got, expected):
    np.testing.assert_allclose(got, np.asarray(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wire_dtype", ["float32", "int8"])
def test_it_runs_with_jax_and_numpy_alone(wire_dtype, tmp_path):
    model = frozen(wire_dtype)
    model.export(tmp_path / "exported", images())
    results = tmp_path / "logits.npz"
    close(logits([start(tmp_path / "exported", results, devices=2)], [results]), model(images()))


def test_two_hosts_need_the_weights_of_their_own_node_only(tmp_path):
    model = frozen("int8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts, files = [], []
    for rank in range(2):
        model.export(tmp_path / f"host-{rank}", images())
        (tmp_path / f"host-{rank}" / f"node-{1 - rank}.npz").unlink()
        files.append(tmp_path / f"logits-{rank}.npz")
        hosts.append(start(tmp_path / f"host-{rank}", files[-1], address, 2, rank, devices=1))
    close(logits(hosts, files), model(images()))


@pytest.mark.parametrize(
    ("wire_dtype", "nodes", "data"), [("float32", 2, 1), ("int8", 4, 1), ("bfloat16", 2, 2)]
)
def test_it_communicates_what_the_plan_says(wire_dtype, nodes, data, tmp_path):
    model = frozen(wire_dtype, nodes, data)
    model.export(tmp_path / "exported", images())
    program = jax.export.deserialize(
        bytearray((tmp_path / "exported" / "program.bin").read_bytes())
    )
    shardings = program.in_shardings_jax(model.mesh.jax_mesh)
    weights, x = jax.tree.unflatten(
        program.in_tree,
        [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
            for a, s in zip(program.in_avals, shardings, strict=True)
        ],
    )[0]
    found = collectives(jax.jit(program.call).lower(weights, x).compile())
    assert len(found) == model.plan.collectives
    assert sum(c.traffic_bytes for c in found) == model.plan.traffic_bytes * len(images())
    kernels = sum(w.size * w.dtype.itemsize for name, w in weights.items() if "scale" not in name)
    assert kernels == nodes * model.plan.weight_bytes_per_node
    assert len((tmp_path / "exported" / "program.bin").read_bytes()) < kernels  # not constants


def test_weights_that_numpy_does_not_know(tmp_path):
    model = frozen(param_dtype=jnp.bfloat16)
    model.export(tmp_path / "exported", images())
    results = tmp_path / "logits.npz"
    close(logits([start(tmp_path / "exported", results, devices=2)], [results]), model(images()))


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = frozen()
    model.export(tmp_path / "exported", images())
    with pytest.raises(dj.DiscoError, match="exists and is not empty"):
        model.export(tmp_path / "exported", images())
    with pytest.raises(dj.DiscoError, match=r"`mesh` .* must have one device for each node"):
        frozen(emulate=True).export(tmp_path / "emulated", images())
    with pytest.raises(dj.DiscoError, match=r"`batch` \(=3"):
        frozen(data=2).export(tmp_path / "odd", np.zeros((3, 16, 16, 3), np.float32))
    assert [p.name for p in tmp_path.iterdir()] == ["exported"]
