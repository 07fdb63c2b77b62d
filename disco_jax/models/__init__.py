"""Models by name. They are made of layers, and never ask where those run."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx

from disco_jax.errors import require
from disco_jax.mesh import NodeMesh
from disco_jax.models.convnext import ConvNeXt
from disco_jax.models.deeplab import LRASPP, DeepLabV3
from disco_jax.models.edsr import EDSR, RCAN
from disco_jax.models.mobilenet import MobileNetV2
from disco_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from disco_jax.models.ssd import SSD, STEPS_300, ResNetTrunk, VGGTrunk
from disco_jax.models.vgg import VGG
from disco_jax.models.vit import VisionTransformer
from disco_jax.trace import name_exchanges

MODELS: dict[str, Callable[..., Any]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
    "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
    "resnet8": partial(ResNet, BasicBlock, (1, 1, 1), width=16, stem="cifar"),
    "resnet20": partial(ResNet, BasicBlock, (3, 3, 3), width=16, stem="cifar"),
    "resnet56": partial(ResNet, BasicBlock, (9, 9, 9), width=16, stem="cifar"),
    "vit_ti": partial(VisionTransformer, 192, 12, 3),
    "vit_s": partial(VisionTransformer, 384, 12, 6),
    "vit_b": partial(VisionTransformer, 768, 12, 12),
    "vit_l": partial(VisionTransformer, 1024, 24, 16),
    "deit_ti": partial(VisionTransformer, 192, 12, 3, pool="distilled"),
    "deit_s": partial(VisionTransformer, 384, 12, 6, pool="distilled"),
    "deit_b": partial(VisionTransformer, 768, 12, 12, pool="distilled"),
    "vit_micro": partial(VisionTransformer, 64, 6, 4, patch=4, pool="mean", position="sincos"),
    "convnext_t": partial(ConvNeXt, (3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_s": partial(ConvNeXt, (3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_b": partial(ConvNeXt, (3, 3, 27, 3), (128, 256, 512, 1024)),
    "mobilenet_v2": MobileNetV2,
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "ssd300": partial(SSD, VGGTrunk, steps=STEPS_300),
    "ssd_vgg16": partial(SSD, VGGTrunk),
    "ssd_resnet18": partial(SSD, partial(ResNetTrunk, BasicBlock, (2, 2, 2))),
    "ssd_resnet50": partial(SSD, partial(ResNetTrunk, Bottleneck, (3, 4, 6))),
    "deeplabv3_resnet18": partial(DeepLabV3, BasicBlock, (2, 2, 2, 2)),
    "deeplabv3_resnet50": partial(DeepLabV3, Bottleneck, (3, 4, 6, 3)),
    "deeplabv3_resnet101": partial(DeepLabV3, Bottleneck, (3, 4, 23, 3)),
    "lraspp_resnet18": partial(LRASPP, BasicBlock, (2, 2, 2, 2)),
    "edsr": EDSR,
    "rcan": RCAN,
}


def create(name: str, *, mesh: NodeMesh, rngs: nnx.Rngs, **kwargs: Any) -> nnx.Module:
    """Builds a model whose every layer is split over the nodes of ``mesh``.

    Channels that do not divide by the nodes get dead channels. The initial numbers depend on
    ``rngs`` alone, not on the number of nodes.

    Args:
      name: a key of ``MODELS``.
      mesh: the nodes.
      rngs: random streams for the weights.
      **kwargs: what the model itself takes (``num_classes``, ``width``, ``dtype``, ...).

    Returns:
      The model; its ``config`` is what it was made of, as JSON.

    Raises:
      DiscoError: if there is no such model, or it does not take an argument.
    """
    near = difflib.get_close_matches(name, MODELS, 1)
    require(
        name in MODELS,
        f"`model` (={name!r}) must be one of {', '.join(MODELS)}"
        + (f"; did you mean {near[0]!r}?" if near else "; choose one of these"),
    )
    try:
        model = MODELS[name](mesh=mesh, rngs=rngs, **kwargs)
    except TypeError as error:
        unexpected = "unexpected keyword argument"
        require(
            unexpected not in str(error),
            f"`model` {name!r} does not take an argument "
            f"{str(error).split(unexpected)[-1].strip()}; remove it",
        )
        raise
    name_exchanges(model)
    model.config = json.dumps({"name": name, **kwargs}, default=lambda dtype: jnp.dtype(dtype).name)
    return model
