"""Models by name: sizes as the literature has them, shapes, and one screen of code."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import disco_jax as dj
from disco_jax.models import MODELS

# torchvision's numbers of parameters for 1000 classes; the CIFAR variants as He et al. count them,
# with a projection at each of the two strided shortcuts.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnet8": 78_042,
    "resnet20": 272_474,
    "resnet56": 855_770,
}


def abstract(name, mesh, **kwargs):
    return nnx.eval_shape(lambda: dj.models.create(name, mesh=mesh, rngs=nnx.Rngs(0), **kwargs))


# timm's and torchvision's numbers, and by hand for the smallest.
TRANSFORMERS = {
    "vit_ti": 5_717_416,
    "vit_s": 22_050_664,
    "vit_b": 86_567_656,
    "vit_l": 304_326_632,
    "deit_ti": 5_910_800,
    "deit_s": 22_436_432,
    "deit_b": 87_338_192,
    "convnext_t": 28_589_128,
    "convnext_s": 50_223_688,
    "convnext_b": 88_591_464,
    "mobilenet_v2": 3_504_872,
    "vgg16": 138_357_544,
    "vit_micro": 3_136 + 6 * (256 + 16_640 + 33_088) + 128 + 65_000,
}


# torchvision's numbers for 20 classes and background, or 21; those of the papers' own code.
DENSE_PREDICTION = {
    "ssd300": 26_285_486,
    "ssd_vgg16": 26_285_486,
    "deeplabv3_resnet50": 39_638_869,
    "deeplabv3_resnet101": 58_630_997,
    "edsr": 1_369_859,
    "rcan": 15_444_667 - 24,  # whose shift by the mean colour is a layer there
}
OURS = {"ssd_resnet18", "ssd_resnet50", "deeplabv3_resnet18", "lraspp_resnet18"}  # nobody else's


def test_every_model_is_counted():
    assert {*PARAMETERS, *TRANSFORMERS, *DENSE_PREDICTION} | OURS == {*MODELS}


COUNTS = [*TRANSFORMERS.items(), *DENSE_PREDICTION.items()]
LONG = ("rcan",)  # 200 blocks to build


@pytest.mark.parametrize(
    ("name", "count"),
    [pytest.param(*c, marks=[pytest.mark.slow] if c[0] in LONG else []) for c in COUNTS],
)
def test_parameters(name, count):
    model = abstract(name, dj.NodeMesh(1, emulate=True))
    sizes = [p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == count


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_shapes(name):
    """Built and traced on shapes alone."""
    cifar = name in ("resnet8", "resnet20", "resnet56")
    classes = 10 if cifar else 1000
    model = abstract(name, dj.NodeMesh(2), num_classes=classes)
    sizes = [p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == PARAMETERS[name]
    size = 32 if cifar else 224
    traced = dj.trace(model, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    last = 8 if cifar else 7
    assert traced.exchanges[-2].shape[1:3] == (last, last)
    assert traced.layers[-1].positions == 1


@pytest.mark.parametrize("nodes", [3, 8])
def test_channels_that_do_not_divide_are_padded(nodes):
    model = abstract("resnet50", dj.NodeMesh(nodes), num_classes=10)
    traced = dj.trace(model, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32))
    assert all(record.shape[-1] % nodes == 0 for record in traced.exchanges)
    assert traced.exchanges[-1].path == "logits"


def test_stride_is_on_the_3x3_convolution():
    model = abstract("resnet50", dj.NodeMesh(2))
    block = model.blocks[3]
    assert (block.conv1.strides, block.conv2.strides) == (1, 2)


def test_a_resnet_is_one_screen():
    assert len(inspect.getsource(dj.models.ResNet).splitlines()) <= 75
