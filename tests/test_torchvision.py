"""SSD300 and DeepLabV3 against torchvision's, with random weights in torchvision's names.

Needs ``pip install torch torchvision``. Its compiled operations are not used: of a torchvision
built for another torch the Python half is enough.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, import_torchvision, meshes
from safetensors.numpy import save_file

import disco_jax as dj
from disco_jax.interop import pretrained
from disco_jax.models.ssd import RATIOS, SCALES, STEPS_300
from disco_jax.tasks.boxes import default_boxes

PARITY = 1e-4


@pytest.fixture(scope="module")
def torchvision():
    torchvision = import_torchvision()
    if torchvision is None:
        pytest.skip("torchvision is not installed")
    torchvision.torch.manual_seed(0)
    return torchvision


def prepare(theirs, path):
    """Moves everything off values that hide a mistake, and writes the state dict."""
    import torch

    for module in theirs.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            else:  # as large at every layer
                fan_in = parameter[0].numel()
                parameter.data = torch.randn_like(parameter) * (2 / fan_in) ** 0.5
        if hasattr(module, "running_var"):
            module.running_mean += 0.1 * torch.randn_like(module.running_mean)
            module.running_var *= 1 + torch.rand_like(module.running_var)
    theirs.eval()
    tensors = {k: np.ascontiguousarray(v.numpy()) for k, v in theirs.state_dict().items()}
    save_file(tensors, path)


def pictures(size, torch):
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    return images, torch.from_numpy(images.transpose(0, 3, 1, 2))


def test_default_boxes_are_torchvisions(torchvision):
    import torch
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.image_list import ImageList

    sizes = [38, 19, 10, 5, 3, 1]
    generator = DefaultBoxGenerator(
        [list(r) for r in RATIOS], scales=list(SCALES), steps=[8, 16, 32, 64, 100, 300]
    )
    maps = [torch.zeros(1, 1, size, size) for size in sizes]
    expected = generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), maps)[0] / 300
    found = default_boxes([(size, size) for size in sizes], SCALES, RATIOS, STEPS_300)
    assert found.shape == (8732, 4)
    close(found, expected.numpy(), 1e-6)


@pytest.mark.slow
def test_ssd300(torchvision, tmp_path):
    import torch

    theirs = torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None)
    prepare(theirs, tmp_path / "ssd.safetensors")
    images, tensor = pictures(300, torch)
    with torch.no_grad():
        found = theirs.head(list(theirs.backbone(tensor).values()))
    model = dj.models.create("ssd300", mesh=meshes(2)[0], num_classes=90, rngs=nnx.Rngs(0))
    pretrained.load(model, tmp_path / "ssd.safetensors")
    frozen = dj.freeze(model, images)
    dj.verify(frozen, images)
    for answer in (dj.plan.Program(model)(images), frozen(images)):
        close(answer["scores"], found["cls_logits"].numpy(), PARITY)
        close(answer["offsets"], found["bbox_regression"].numpy(), PARITY)
        assert answer["boxes"].shape == (8732, 4)


@pytest.mark.slow
@pytest.mark.parametrize("auxiliary", [False, True])
def test_deeplabv3_resnet50(torchvision, tmp_path, auxiliary):
    import torch

    theirs = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, aux_loss=True
    )
    prepare(theirs, tmp_path / "deeplab.safetensors")
    images, tensor = pictures(97, torch)
    with torch.no_grad():
        expected = theirs(tensor)
    model = dj.models.create(
        "deeplabv3_resnet50", mesh=meshes(2)[0], auxiliary=auxiliary, rngs=nnx.Rngs(0)
    )
    pretrained.load(model, tmp_path / "deeplab.safetensors")
    frozen = dj.freeze(model, images)
    dj.verify(frozen, images)
    for answer in (dj.plan.Program(model)(images), frozen(images)):
        close(np.moveaxis(answer, -1, 1), expected["out"].numpy(), PARITY)
    if auxiliary:
        model.eval()
        x = jnp.asarray(images)
        seen = model._full_size(model.auxiliary(model.backbone.features(x)[-2]), x)
        close(np.moveaxis(seen, -1, 1), expected["aux"].numpy(), PARITY)


def test_mobilenet_v2(torchvision, tmp_path):
    import torch

    theirs = torchvision.models.mobilenet_v2(weights=None)
    prepare(theirs, tmp_path / "mobilenet.safetensors")
    images, tensor = pictures(64, torch)
    with torch.no_grad():
        expected = theirs(tensor)
    mesh = dj.NodeMesh(2, emulate=True)
    model = dj.models.create("mobilenet_v2", mesh=mesh, rngs=nnx.Rngs(0))
    pretrained.load(model, tmp_path / "mobilenet.safetensors")
    close(dj.plan.Program(model)(images), expected.numpy(), PARITY)


@pytest.mark.parametrize("name", ["deeplabv3_resnet18", "ssd_resnet18", "ssd300"])
def test_backbones_start_from_torchvisions_classifiers(name, torchvision, tmp_path):
    """All that a classifier has of the backbone is read, kernels in our layout."""
    if name == "ssd300":
        features = torchvision.models.vgg16().features
        theirs = {f"features.{k}": v for k, v in features.state_dict().items()}
        theirs["classifier.0.weight"] = torchvision.torch.zeros(8, 8)
    else:
        theirs = torchvision.models.resnet18().state_dict()
    arrays = {k: np.ascontiguousarray(v.numpy()) for k, v in theirs.items()}
    save_file(arrays, tmp_path / "classifier.safetensors")
    model = dj.models.create(name, mesh=dj.NodeMesh(2, emulate=True), rngs=nnx.Rngs(0))
    pretrained.load_backbone(model, tmp_path / "classifier.safetensors")
    if name == "ssd300":
        pairs = [(model.trunk.convs[12], "features.28"), (model.trunk.convs[0], "features.0")]
    else:
        backbone = model.backbone if hasattr(model, "backbone") else model.trunk.backbone
        pairs = [(backbone.conv, "conv1"), (backbone.blocks[5].conv2, "layer3.1.conv2")]
    for layer, path in pairs:
        np.testing.assert_array_equal(
            layer.kernel[...], arrays[f"{path}.weight"].transpose(2, 3, 1, 0)
        )
