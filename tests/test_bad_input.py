"""Wrong uses of the library: one clear error each, with name, value, rule and remedy."""

import gzip
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import disco_jax as dj
from disco_jax.data import pipeline, sources
from disco_jax.train import optimizer
from disco_jax.train.checkpoint import Checkpoints, check_writable
from disco_jax.train.step import TrainState

R = nnx.Rngs(0)
Conv, Dense = dj.layers.Conv, dj.layers.Dense


def mesh(nodes=2, **kwargs):
    return dj.NodeMesh(nodes, **kwargs)


def attention():
    return dj.layers.MultiHeadAttention(2, 4, mesh=mesh(), rngs=R)


def conv(c_in=4, c_out=4, kernel=(3, 3), **kwargs):
    return Conv(c_in, c_out, kernel, mesh=mesh(), rngs=R, **kwargs)


def zeros(*shape):
    return jnp.zeros(shape)


def transform(**kwargs):
    return dj.sparsify.sparse_exchange(
        optax.sgd(0.1), **{"density": 0.5, "steps": 1, "every": 1} | kwargs
    )


def preprocess(*transforms, size=8, channels=1):
    return pipeline.Preprocess(size, transforms, (0.0,) * channels, (1.0,) * channels)


def frozen(**kwargs):
    layer = conv()
    return dj.freeze(layer, zeros(1, 4, 4, 4), **kwargs)


LIBRARY = {
    "nodes_zero": (lambda: mesh(0), r"`nodes` \(=0\).*positive integer.*nodes=1"),
    "nodes_fraction": (lambda: mesh(2.5), r"`nodes` \(=2.5\).*positive integer"),
    "data_negative": (lambda: mesh(2, data=-1), r"`data` \(=-1\).*positive integer"),
    "too_few_devices": (
        lambda: mesh(16, emulate=False),
        r"`nodes` \(=16\).*needs 16 devices.*has 8.*JAX_NUM_CPU_DEVICES=16.*emulate=True",
    ),
    "too_few_data": (lambda: mesh(1, data=9), r"`data` \(=9\) needs 9.*has 8.*DEVICES=9"),
    "out_features": (
        lambda: conv(4, 63),
        r"`out_features` \(=63\) must be divisible by `nodes` \(=2\).*pad=True to add 1 dead",
    ),
    "in_features": (lambda: conv(5, 4), r"`features` \(=5\) must be divisible.*pad=True"),
    "norm_features": (
        lambda: dj.layers.BatchNorm(5, mesh=mesh(), rngs=R),
        r"`num_features` \(=5\) must be divisible by `nodes`.*pad=True",
    ),
    "no_features": (lambda: conv(4, 0), r"`out_features` \(=0\) must be at least 1"),
    "groups": (
        lambda: conv(6, 6, feature_group_count=3),
        r"`feature_group_count` \(=3\) must be divisible by `nodes` \(=2\).*multiple of 2",
    ),
    "no_mesh": (
        lambda: Conv(4, 4, (3, 3), rngs=R),
        r"`mesh` and `exchange` are both missing; pass mesh=",
    ),
    "other_exchange": (
        lambda: Dense(4, 4, exchange=dj.Exchange(8, mesh=mesh()), rngs=R),
        r"`in_features` \(=4\) must equal the features of the exchange \(=8\).*in_features=8",
    ),
    "weight_mask": (
        lambda: conv(mask=jnp.ones((3, 3, 4, 4))),
        r"`mask` of flax.nnx.Conv is not supported by the split layer; remove it",
    ),
    "input_channels": (
        lambda: conv()(zeros(1, 8, 8, 6)),
        r"`input channels` \(=6\) must be 4.*features=4, nodes=2",
    ),
    "input_rank": (lambda: conv()(zeros(1, 8, 4)), r"must have 4 axes.*not 3; add a batch axis"),
    "batch": (
        lambda: Dense(4, 4, mesh=mesh(2, data=2), rngs=R)(zeros(3, 4)),
        r"`batch` \(=3,.*must be divisible by `data` \(=2\).*another batch size",
    ),
    "padding": (
        lambda: conv(padding="FULL")(zeros(1, 8, 8, 4)),
        r"`padding` \(='FULL'\) must be 'SAME', 'VALID'",
    ),
    "mask_shape": (
        lambda: conv().exchange.set_mask(jnp.ones((4, 2), bool)),
        r"`mask`.* has shape \(4, 2\).*\[nodes, channels\] = \[2, 4\]",
    ),
    "mask_dtype": (
        lambda: conv().exchange.set_mask(jnp.ones((2, 4))),
        r"`mask`.* has dtype float32.*must be bool.*astype",
    ),
    "scope": (
        lambda: dj.layers.LayerNorm(4, mesh=mesh(), scope="row", rngs=R),
        r"`scope` \(='row'\) must be 'all'.*or 'node'",
    ),
    "norm_groups": (
        lambda: dj.layers.GroupNorm(6, 3, mesh=mesh(), rngs=R),
        r"`num_groups` \(=3\) must be divisible by `nodes` \(=2\).*another number",
    ),
    "local_norm": (
        lambda: dj.layers.LayerNorm(5, mesh=mesh(), scope="node", pad=True, rngs=R),
        r"`num_features` \(=5\) must be divisible by `nodes` \(=2\) with scope='node'",
    ),
    "norm_axes": (
        lambda: dj.layers.LayerNorm(4, mesh=mesh(), reduction_axes=(1, 2), rngs=R),
        r"`reduction_axes` of flax.nnx.LayerNorm is not supported",
    ),
    "no_groups": (
        lambda: dj.layers.GroupNorm(8, 0, mesh=mesh(), rngs=R),
        r"`num_groups` \(=0\) must be divisible.*another number",
    ),
    "concat": (
        lambda: dj.layers.concat([zeros(1, 4, 3)], mesh=mesh()),
        r"`channels of the input` \(=3\) must be divisible by `nodes` \(=2\); give the layer",
    ),
    "grouped_exchange": (
        lambda: Conv(4, 8, 3, feature_group_count=2, exchange=dj.Exchange(4, mesh=mesh()), rngs=R),
        r"`feature_group_count` \(=2\) needs an exchange that moves nothing, not Exchange",
    ),
    "foreign_readable": (
        lambda: Dense(4, 4, mesh=mesh(), rngs=R)(dj.Exchange(4, mesh=mesh())(zeros(1, 4))),
        r"`inputs` of Dense\(in_features=4\) come from an exchange that is not the layer's own",
    ),
    "sections": (
        lambda: dj.layers.split(zeros(1, 4, 6), 2, mesh=mesh()),
        r"`sections` \(=2\) must divide.*\(=3, of 6 on 2 nodes\)",
    ),
    "shuffle": (
        lambda: dj.layers.pixel_shuffle(zeros(1, 4, 4, 4), 2, mesh=mesh()),
        r"\(=2, of 4 on 2 nodes\) must be divisible by `scale`\*\*2 \(=4\).*multiple of 8",
    ),
    "model_name": (
        lambda: dj.models.create("resnt50", mesh=mesh(), rngs=R),
        r"`model` \(='resnt50'\) must be one of.*did you mean 'resnet50'",
    ),
    "model_argument": (
        lambda: dj.models.create("resnet20", mesh=mesh(), rngs=R, widht=8),
        r"`model` 'resnet20' does not take an argument 'widht'",
    ),
    "stem": (
        lambda: dj.models.create("resnet20", mesh=mesh(), rngs=R, stem="vgg"),
        r"`stem` \(='vgg'\) must be one of imagenet, cifar",
    ),
    "density": (
        lambda: dj.sparsify.prune(conv(), 1.5),
        r"`density` \(=1.5\) must be between 0.*and 1.*such as 0.2",
    ),
    "score": (
        lambda: dj.sparsify.prune(conv(), 0.5, "l3"),
        r"`score` \(='l3'\) must be one of activation, l1, l2, none, random",
    ),
    "score_option": (
        lambda: dj.sparsify.prune(conv(), 0.5, scroe="random"),
        r"`budget` 'uniform' does not take \['scroe'\]; it takes nothing",
    ),
    "nothing_to_prune": (
        lambda: dj.sparsify.prune(nnx.Linear(2, 2, rngs=R), 0.5),
        r"`model` \(=Linear\) has no masked exchange",
    ),
    "schedule": (
        lambda: transform(schedule="cosine"),
        r"`schedule` \(='cosine'\) must be one of constant, cubic",
    ),
    "every": (lambda: transform(every=0), r"`every` \(=0\) must be at least 1"),
    "unnamed": (
        lambda: transform().init(nnx.state(attention(), nnx.Param)),
        r"`key.kernel` reads an exchange that has no name yet; call .*name_exchanges\(model\)",
    ),
    "no_exchange": (
        lambda: transform().init(nnx.state(nnx.Linear(2, 2, rngs=R), nnx.Param)),
        r"`params` hold no kernel that names its exchange.*name_exchanges\(model\) first",
    ),
    "no_params": (
        lambda: transform().update({}, None),
        r"`params` is missing; call update\(grads, state, params\)",
    ),
    "frozen_twice": (
        lambda: dj.freeze(frozen().model, zeros(1, 4, 4, 4)),
        r"`model` \(=Conv\) has no masked exchange.*not frozen already",
    ),
    "other_nodes": (
        lambda: frozen(mesh=mesh(4)),
        r"`nodes` of the mesh \(=4\) must be those of the model \(=2\).*NodeMesh\(nodes=2\)",
    ),
    "int8 without images": (
        lambda: dj.freeze(conv(), jax.ShapeDtypeStruct((1, 4, 4, 4), "f4"), wire_dtype="int8"),
        r"`images` \(=a ShapeDtypeStruct\) must be images where wire_dtype='int8'",
    ),
    "wire": (
        lambda: frozen(wire_dtype="int3"),
        r"`wire_dtype` \(='int3'\) must be one of float64.*wire_dtype=None",
    ),
    "verify_emulated": (
        lambda: dj.verify(frozen(mesh=mesh(2, emulate=True)), zeros(1, 4, 4, 4)),
        r"`mesh` \(=.*emulated\)\) has no links.*mesh=",
    ),
    "no_node_mesh": (
        lambda: dj.lower(nnx.Linear(2, 2, rngs=R), zeros(1, 2)),
        r"`model` \(=Linear\) has no layer with a NodeMesh; build it with",
    ),
    "plan_garbage": (
        lambda: dj.CommunicationPlan.from_json("{"),
        r"`plan` is not a communication plan.*plan.to_json\(\)",
    ),
    "plan_version": (
        lambda: dj.CommunicationPlan.from_json('{"version": 99}'),
        r"`version` of the plan \(=99\) must be 4; freeze the model again",
    ),
    "plan_field": (
        lambda: dj.CommunicationPlan.from_json('{"version": 4, "nodes": 2}'),
        r"`plan` lacks or misspells a field.*freeze the model again",
    ),
    "source": (
        lambda: sources.load("mnist", "train"),
        r"`data.source` \(='mnist'\) must be digits, .*, or KIND:NAME with a kind of idx",
    ),
    "split": (
        lambda: sources.load("digits", "dev"),
        r"`split` \(='dev'\) must be one of train, validation, test",
    ),
    "idx_missing": (
        lambda: sources.load("idx:/nowhere", "train"),
        r"idx:/nowhere\) needs the file train-images-idx3-ubyte.*dataset-fashion-mnist",
    ),
    "folder_missing": (
        lambda: sources.load("folder:/nowhere", "train"),
        r"folder:/nowhere\) needs the folder /nowhere/train.*create it",
    ),
    "tfds_missing": (
        lambda: sources.load("tfds:imagenet2012", "train"),
        r"tfds:imagenet2012\) split 'train' is not to be had.*tfds build imagenet2012",
    ),
    "transform": (
        lambda: preprocess("rotate"),
        r"`transforms` contains 'rotate', but must be among degrade",
    ),
    "size": (lambda: preprocess("resize", size=0), r"`data.size` \(=0\) must be at least 1 pixel"),
    "image_shape": (
        lambda: preprocess("flip", size=9)(sources.load("digits", "train")[0], np.random),
        r"`image` has shape \(8, 8, 1\) after.*must be \(9, 9, 1\); add a resize",
    ),
    "batch_size": (
        lambda: pipeline.training_batches(
            sources.load("digits", "train"), preprocess("resize"), 5000, seed=0
        ),
        r"`batch_size` \(=5000\) must be between 1 and the 1293 training images",
    ),
    "optimizer": (
        lambda: optimizer.make(_optimizer("lion"), 0.1, 10, 5),
        r"`optimizer.name` \(='lion'\) must be one of sgd, adamw",
    ),
    "learning_rate": (
        lambda: optimizer.make(_optimizer("sgd"), 0.0, 10, 5),
        r"`learning_rate` \(=0.0\) must be positive",
    ),
    "workdir": (
        lambda: check_writable(_path("/proc/nothing/here")),
        r"`workdir` \(=/proc/nothing/here\) cannot be written \(.*\); choose another",
    ),
}


def _optimizer(name):
    from disco_jax.config import defaults

    config = defaults().optimizer
    config.name = name
    return config


def _path(text):
    from pathlib import Path

    return Path(text)


@pytest.mark.parametrize("case", LIBRARY)
def test_library(case):
    use, message = LIBRARY[case]
    with pytest.raises(dj.DiscoError) as caught:
        use()
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    assert "\n" not in str(caught.value)


def write_idx(path, array, claimed=None):
    shape = claimed or array.shape
    header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}i", *shape)
    path.write_bytes(header + array.tobytes())


def idx_folder(folder, images, labels, **kwargs):
    write_idx(folder / "train-images-idx3-ubyte", images, **kwargs)
    write_idx(folder / "train-labels-idx1-ubyte", labels)
    return lambda: sources.load(f"idx:{folder}", "train")


def damaged_gzip(folder):
    raw = gzip.compress(bytes(1000))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(raw[:-9])
    return lambda: sources.load(f"idx:{folder}", "train")


def cut_header(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0]))
    return lambda: sources.load(f"idx:{folder}", "train")


def too_few(folder):
    return idx_folder(folder, IMAGES[:5], LABELS[:5])


def not_idx(folder):
    (folder / "train-images-idx3-ubyte").write_bytes(b"PNG or so")
    return lambda: sources.load(f"idx:{folder}", "train")


def image_folder(folder, content=b"not an image"):
    for i in range(20):
        path = folder / "train" / "cat" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return sources.load(f"folder:{folder}", "train")


def other_classes(folder):
    image_folder(folder)
    (folder / "val" / "dog").mkdir(parents=True)
    return lambda: sources.load(f"folder:{folder}", "test")


def empty_class(folder):
    (folder / "train" / "cat").mkdir(parents=True)
    return lambda: sources.load(f"folder:{folder}", "train")


def no_classes(folder):
    (folder / "train").mkdir()
    return lambda: sources.load(f"folder:{folder}", "train")


def no_test(folder):
    image_folder(folder)
    return lambda: sources.load(f"folder:{folder}", "test")


IMAGES, LABELS = np.zeros((20, 4, 4), np.uint8), np.zeros(20, np.uint8)
FILES = {
    "truncated_idx": (
        lambda d: idx_folder(d, IMAGES[:10], LABELS, claimed=IMAGES.shape),
        r"holds 176 bytes, but its header says shape \(20, 4, 4\), which takes 336; .*truncated",
    ),
    "cut_header": (cut_header, r"ends within its header \(6 of 16 bytes\); .*fetch it again"),
    "too_few_images": (too_few, r"`data.source` has 5 training images, but needs at least 10"),
    "unequal_idx": (
        lambda d: idx_folder(d, IMAGES, LABELS[:7]),
        r"images of shape \(20, 4, 4\) and labels of shape \(7,\).*replace the files",
    ),
    "truncated_gzip": (damaged_gzip, r"is truncated or damaged.*fetch it again"),
    "not_idx": (not_idx, r"starts with bytes '504e4720'.*name an IDX file"),
    "broken_image": (lambda d: lambda: image_folder(d)[0], r"`image` .*cannot be read.*replace"),
    "other_classes": (other_classes, r"class folders \['dog'\] that the train folder lacks"),
    "empty_class": (empty_class, r"holds no images; put them in"),
    "no_classes": (no_classes, r"has no class folders; put each class"),
    "no_test": (no_test, r"has no test images; add .*/test or .*/val"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case, tmp_path):
    make, message = FILES[case]
    use = make(tmp_path)
    with pytest.raises(dj.DiscoError) as caught:
        use()
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)


class TestCheckpoint:
    settings = {"model": {"name": "dense", "width": 8}, "nodes": 2}  # noqa: RUF012

    def state(self):
        layer = Dense(4, 4, mesh=mesh(), rngs=nnx.Rngs(0))
        return TrainState.create(layer, optax.sgd(0.1), mesh=mesh(), ema=False)

    def test_none(self, tmp_path):
        with pytest.raises(dj.DiscoError, match=r"no checkpoint in .*train first \(--mode=train"):
            Checkpoints(tmp_path).restore(self.state(), settings=self.settings)

    def test_other_architecture(self, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(self.state(), data={}, settings=self.settings)
        message = r"`model.width` \(=4\) differs from the checkpoint's \(=8\).*another --workdir"
        other = {"model": {"name": "dense", "width": 4}, "nodes": 2}
        with pytest.raises(dj.DiscoError, match=message):
            checkpoints.restore(self.state(), settings=other)

    def test_a_field_of_later_has_its_default(self, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(self.state(), data={}, settings=self.settings)
        checkpoints.restore(self.state(), settings={**self.settings, "accumulate": 1})
        with pytest.raises(dj.DiscoError, match=r"`accumulate` \(=2\) differs .*\(=1\)"):
            checkpoints.restore(self.state(), settings={**self.settings, "accumulate": 2})

    def test_damaged(self, tmp_path):
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(self.state(), data={}, settings=self.settings)
        checkpoints.close()
        for path in (tmp_path / "0" / "state").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
        with pytest.raises(dj.DiscoError, match=r"`checkpoint` 0 in .* cannot be read .*delete"):
            Checkpoints(tmp_path).restore(self.state(), settings=self.settings)

    def test_keeps_no_fewer_than_one(self, tmp_path):
        with pytest.raises(dj.DiscoError, match=r"`keep` \(=0\)|`checkpoint.keep` \(=0\)"):
            Checkpoints(tmp_path, keep=0)


def test_there_are_enough_wrong_uses():
    assert len(LIBRARY) + len(FILES) >= 25
    assert jax.device_count() == 8
