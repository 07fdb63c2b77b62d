"""Where nodes run: chosen for the user where it can be, said plainly where it is too late."""

import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

import disco_jax as dj


def python(code, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip()


SHOW = "import disco_jax as dj, jax; m = dj.NodeMesh(4); print(m, jax.device_count())"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "NodeMesh(nodes=4, data=1, cpu) 4"),
        ({"JAX_NUM_CPU_DEVICES": "2"}, "NodeMesh(nodes=4, data=1, emulated) 2"),
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=6"},
            "NodeMesh(nodes=4, data=1, cpu) 6",
        ),
    ],
)
def test_cpu_devices_are_chosen_only_where_nobody_did(environment, expected):
    assert output(python(SHOW, **environment)) == expected


def test_too_late_is_said_with_the_remedy():
    code = (
        "import jax; jax.devices()\nimport disco_jax as dj\n"
        "try: dj.NodeMesh(2, emulate=False)\nexcept dj.DiscoError as e: print(e)\n"
        "print(dj.NodeMesh(2))"
    )
    message, mesh = output(python(code)).splitlines()
    assert "JAX_NUM_CPU_DEVICES=2 before Python starts" in message
    assert "before the first JAX computation" in message
    assert mesh == "NodeMesh(nodes=2, data=1, emulated)"
    late = python("import jax; jax.devices(); import disco_jax as dj; dj.NodeMesh(2)")
    assert "UserWarning: JAX started with 1 CPU device(s)" in late.communicate(timeout=300)[1]


def test_equal_meshes_are_equal():
    assert dj.NodeMesh(2) == dj.NodeMesh(2)
    assert hash(dj.NodeMesh(2)) == hash(dj.NodeMesh(2))
    assert dj.NodeMesh(2) != dj.NodeMesh(2, emulate=True)


HOST = """
import sys, os
import jax, numpy as np
import disco_jax as dj
from disco_jax import runtime
port, rank, directory = sys.argv[1:]
peers = runtime.connect(f"127.0.0.1:{port}", 2, int(rank))
from flax import nnx
mesh = dj.NodeMesh(2, emulate=False)
make = lambda mesh: dj.models.create(
    "resnet8", mesh=mesh, num_classes=10, width=4, rngs=nnx.Rngs(0))
model = make(mesh)
dj.sparsify.prune(model, 0.5)
images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
frozen = dj.freeze(model, images)
dj.verify(frozen, images)
mine = [s.data for s in frozen(images).addressable_shards]
alone = dj.NodeMesh(2, emulate=True, devices=jax.local_devices())
single = make(alone)
dj.sparsify.prune(single, 0.5)
single.eval()
expected = np.split(np.asarray(single(images)), 2, -1)[int(rank)]
assert len(mine) == 1 and np.abs(np.asarray(mine[0]) - expected).max() < 1e-5
loaded = dj.load(f"{directory}/host-{rank}", mesh)  # with the weights of this node only
again = [s.data for s in loaded(images).addressable_shards]
assert np.abs(np.asarray(again[0]) - expected).max() < 1e-5
try:
    loaded.save(f"{directory}/again-{rank}")
except dj.DiscoError as error:
    assert "is spread over several hosts" in str(error)
else:
    raise AssertionError("saved what it does not have")
frozen(images + int(rank))  # images are not sent round to be compared
if hasattr(os, "SCHED_BATCH"):  # gloo's thread interrupts no other
    policies = [os.sched_getscheduler(int(t)) for t in os.listdir("/proc/self/task")]
    assert policies.count(os.SCHED_BATCH) == 1 and os.sched_getscheduler(0) == os.SCHED_OTHER
print(mesh, "agrees", flush=True)
peers.close()
"""


def test_two_processes_are_two_nodes(tmp_path):
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create("resnet8", mesh=mesh, num_classes=10, width=4, rngs=nnx.Rngs(0))
    dj.sparsify.prune(model, 0.5)
    dj.freeze(model, np.zeros((2, 16, 16, 3), np.float32)).save(tmp_path / "plan")
    for rank in range(2):
        ignored = shutil.ignore_patterns(f"node-{1 - rank}.*")
        shutil.copytree(tmp_path / "plan", tmp_path / f"host-{rank}", ignore=ignored)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    hosts = [python(HOST, port, str(rank), str(tmp_path)) for rank in range(2)]
    for host in hosts:
        assert output(host).endswith("NodeMesh(nodes=2, data=1, cpu) agrees")
