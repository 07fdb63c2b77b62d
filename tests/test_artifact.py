"""A saved plan runs elsewhere as it ran here, and says what is wrong where something is."""

import json

import numpy as np
import pytest
from flax import nnx

import disco_jax as dj


def frozen_resnet(mesh, **how):
    model = dj.models.create("resnet8", mesh=mesh, num_classes=10, width=4, rngs=nnx.Rngs(0))
    dj.sparsify.prune(model, 0.5)
    return dj.freeze(model, images(), **how)


def images():
    return np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plans") / "int8"
    frozen = frozen_resnet(dj.NodeMesh(2, emulate=False), wire_dtype="int8")
    frozen.save(directory)
    return directory, frozen


@pytest.mark.parametrize("emulate", [True, False])
def test_what_is_loaded_is_what_was_saved(saved, emulate):
    directory, frozen = saved
    loaded = dj.load(directory, dj.NodeMesh(2, emulate=emulate))
    assert loaded.plan == frozen.plan
    assert np.abs(np.asarray(loaded(images())) - np.asarray(frozen(images()))).max() < 1e-5
    if not emulate:
        dj.verify(loaded, images())
        kernel = loaded.model.blocks[0].conv1.kernel[...]
        assert {s.data.shape[0] for s in kernel.addressable_shards} == {1}


def copy(directory, target):
    target.mkdir()
    for file in directory.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def damage(target, name):
    content = bytearray((target / name).read_bytes())
    content[-1] ^= 1
    (target / name).write_bytes(bytes(content))


def change(target, **fields):
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps(manifest | fields))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / "manifest.json").unlink(), "manifest.json` cannot be read"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json` is damaged"),
        (lambda d: (d / "node-1.safetensors").unlink(), "node-1.safetensors` cannot be read"),
        (lambda d: damage(d, "node-0.safetensors"), "node-0.safetensors` is not the file"),
        (lambda d: damage(d, "plan.json"), "plan.json` is not the file that was saved"),
        (lambda d: change(d, format=99), r"`format` of .* \(=99\) must be 2"),
        (lambda d: change(d, model=None), "`build` is missing"),
        (lambda d: change(d, model='{"name": "resnet9"}'), "`model` .='resnet9'. must be one of"),
        (lambda d: change(d, model='{"name": "resnet18"}'), "differ in"),
    ],
)
def test_what_is_wrong_is_said(saved, tmp_path, harm, message):
    target = copy(saved[0], tmp_path / "copy")
    harm(target)
    with pytest.raises(dj.DiscoError, match=message):
        dj.load(target, dj.NodeMesh(2, emulate=True))


def test_another_number_of_nodes_is_refused(saved):
    with pytest.raises(dj.DiscoError, match=r"`nodes` of the mesh \(=4\)"):
        dj.load(saved[0], dj.NodeMesh(4, emulate=True))


def test_nothing_is_overwritten(saved):
    directory, frozen = saved
    with pytest.raises(dj.DiscoError, match="is not empty"):
        frozen.save(directory)


def test_an_older_model_is_replaced_and_nothing_else(saved, tmp_path):
    target = copy(saved[0], tmp_path / "packed")
    (target / "of_old").touch()
    saved[1].save(target, replace=True)
    assert {p.name for p in target.iterdir()} == {p.name for p in saved[0].iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["packed"]
    with pytest.raises(dj.DiscoError, match="is not empty"):
        saved[1].save(tmp_path, replace=True)


def test_a_network_of_ones_own_is_built_by_its_function(tmp_path):
    class Own(nnx.Module):
        def __init__(self, mesh):
            self.mesh = mesh
            self.first = dj.layers.Dense(6, 8, mesh=mesh, rngs=nnx.Rngs(0))
            self.last = dj.layers.Dense(8, 4, mesh=mesh, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    model = Own(dj.NodeMesh(2, emulate=True))
    dj.sparsify.prune(model, 0.5)
    frozen = dj.freeze(model, x, wire_dtype="bfloat16")
    frozen.save(tmp_path / "own")
    loaded = dj.load(tmp_path / "own", dj.NodeMesh(2, emulate=True), build=Own)
    assert np.array_equal(loaded(x), frozen(x))
