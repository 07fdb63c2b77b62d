"""Where nodes run: chosen for the user where it can be, said plainly where it is too late."""

import os
import socket
import subprocess
import sys

import pytest

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
port, rank = sys.argv[1:]
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
frozen(images + int(rank))  # images are not sent round to be compared
print(mesh, "agrees", flush=True)
peers.close()
"""


def test_two_processes_are_two_nodes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    hosts = [python(HOST, port, str(rank)) for rank in range(2)]
    for host in hosts:
        assert output(host).endswith("NodeMesh(nodes=2, data=1, cpu) agrees")
