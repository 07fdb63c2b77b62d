"""Models as somebody writes them who has never heard of nodes: plain ``flax.nnx``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class MixerBlock(nnx.Module):
    def __init__(self, tokens, features, rngs):
        self.norm1 = nnx.LayerNorm(features, rngs=rngs)
        self.token_in = nnx.Linear(tokens, 2 * tokens, rngs=rngs)
        self.token_out = nnx.Linear(2 * tokens, tokens, rngs=rngs)
        self.norm2 = nnx.LayerNorm(features, rngs=rngs)
        self.channel_in = nnx.Linear(features, 2 * features, rngs=rngs)
        self.channel_out = nnx.Linear(2 * features, features, rngs=rngs)

    def __call__(self, x):
        y = jnp.swapaxes(self.norm1(x), 1, 2)
        y = self.token_out(nnx.gelu(self.token_in(y)))
        x = x + jnp.swapaxes(y, 1, 2)
        return x + self.channel_out(nnx.gelu(self.channel_in(self.norm2(x))))


class Mixer(nnx.Module):
    """MLP-Mixer (Tolstikhin et al. 2021)."""

    def __init__(self, features=16, depth=2, rngs=None):
        self.patches = nnx.Conv(3, features, (4, 4), (4, 4), rngs=rngs)
        self.blocks = nnx.List([MixerBlock(16, features, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, 6, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


class DoubleConv(nnx.Module):
    def __init__(self, c_in, c_out, rngs):
        self.conv1 = nnx.Conv(c_in, c_out, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(c_out, rngs=rngs)
        self.conv2 = nnx.Conv(c_out, c_out, (3, 3), use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(c_out, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(x)))


class UNet(nnx.Module):
    """U-Net (Ronneberger et al. 2015): what is skipped is concatenated."""

    def __init__(self, width=8, rngs=None):
        self.down1 = DoubleConv(3, width, rngs)
        self.down2 = DoubleConv(width, 2 * width, rngs)
        self.bottom = DoubleConv(2 * width, 4 * width, rngs)
        self.up2 = DoubleConv(6 * width, 2 * width, rngs)
        self.up1 = DoubleConv(3 * width, width, rngs)
        self.out = nnx.Conv(width, 3, (1, 1), rngs=rngs)

    def __call__(self, x):
        def double(x):
            b, h, w, c = x.shape
            return jax.image.resize(x, (b, 2 * h, 2 * w, c), "bilinear")

        a = self.down1(x)
        b = self.down2(nnx.max_pool(a, (2, 2), (2, 2)))
        c = self.bottom(nnx.max_pool(b, (2, 2), (2, 2)))
        b = self.up2(jnp.concatenate([double(c), b], axis=-1))
        a = self.up1(jnp.concatenate([double(b), a], axis=-1))
        return self.out(a)


class SqueezeExcite(nnx.Module):
    def __init__(self, features, rngs):
        self.squeeze = nnx.Linear(features, features // 4, rngs=rngs)
        self.excite = nnx.Linear(features // 4, features, rngs=rngs)

    def __call__(self, x):
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * nnx.hard_sigmoid(self.excite(nnx.relu(self.squeeze(y))))


class InvertedResidual(nnx.Module):
    def __init__(self, c_in, c_out, stride, expand, rngs):
        hidden = expand * c_in
        self.residual = stride == 1 and c_in == c_out
        self.expand = nnx.Conv(c_in, hidden, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(hidden, rngs=rngs)
        self.depthwise = nnx.Conv(
            hidden,
            hidden,
            (3, 3),
            strides=stride,
            feature_group_count=hidden,
            use_bias=False,
            rngs=rngs,
        )
        self.bn2 = nnx.BatchNorm(hidden, rngs=rngs)
        self.se = SqueezeExcite(hidden, rngs)
        self.project = nnx.Conv(hidden, c_out, (1, 1), use_bias=False, rngs=rngs)
        self.bn3 = nnx.BatchNorm(c_out, rngs=rngs)

    def __call__(self, x):
        y = nnx.relu6(self.bn1(self.expand(x)))
        y = self.se(nnx.relu6(self.bn2(self.depthwise(y))))
        y = self.bn3(self.project(y))
        return x + y if self.residual else y


class MobileNet(nnx.Module):
    """MobileNetV2 (Sandler et al. 2018) with squeeze-excite."""

    def __init__(self, rngs=None):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.blocks = nnx.Sequential(
            InvertedResidual(8, 8, 1, 2, rngs),
            InvertedResidual(8, 12, 2, 4, rngs),
            InvertedResidual(12, 12, 1, 4, rngs),
        )
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = self.blocks(nnx.relu6(self.bn(self.stem(x))))
        return self.head(self.dropout(x.mean((1, 2))))


class DenseNet(nnx.Module):
    """A block of DenseNet (Huang et al. 2017) and a transition."""

    def __init__(self, growth=4, depth=3, rngs=None):
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        widths = [8 + i * growth for i in range(depth + 1)]
        self.norms = nnx.List([nnx.BatchNorm(w, rngs=rngs) for w in widths])
        self.convs = nnx.List([nnx.Conv(w, growth, (3, 3), rngs=rngs) for w in widths[:-1]])
        self.transition = nnx.Conv(widths[-1], widths[-1] // 2, (1, 1), rngs=rngs)
        self.head = nnx.Linear(widths[-1] // 2 * 16, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(self.stem(x), (2, 2), (2, 2), padding="SAME")
        for norm, conv in zip(self.norms, self.convs, strict=False):
            x = jnp.concatenate([x, conv(nnx.relu(norm(x)))], axis=-1)
        x = self.transition(nnx.relu(self.norms[-1](x)))
        x = nnx.avg_pool(x, (2, 2), (2, 2))
        return self.head(x.reshape(x.shape[0], -1))


class EncoderBlock(nnx.Module):
    def __init__(self, features, heads, rngs):
        self.norm1 = nnx.LayerNorm(features, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads,
            in_features=features,
            dropout_rate=0.1,
            decode=False,
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(features, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(features, 2 * features, rngs=rngs),
            nnx.gelu,
            nnx.Dropout(0.1, rngs=rngs),
            nnx.Linear(2 * features, features, rngs=rngs),
        )

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nnx.Module):
    """ViT (Dosovitskiy et al. 2021) as in Flax's tutorials."""

    def __init__(self, features=24, heads=4, depth=2, rngs=None):
        self.patches = nnx.Conv(3, features, (4, 4), (4, 4), padding="VALID", rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (1, 17, features)))
        self.token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, features)))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.blocks = nnx.Sequential(*[EncoderBlock(features, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, 5, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.tile(self.token[...], (x.shape[0], 1, 1))
        x = jnp.concatenate([token, x], axis=1)
        x = self.blocks(self.dropout(x + self.positions[...]))
        return self.head(self.norm(x)[:, 0])


class FusedAttention(nnx.Module):
    """Query, key and value by one layer, as timm writes it."""

    def __init__(self, features, heads, rngs):
        self.heads = heads
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.qkv = nnx.Linear(features, 3 * features, rngs=rngs)
        self.out = nnx.Linear(features, features, rngs=rngs)

    def __call__(self, x):
        b, t, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, t, 3, self.heads, c // self.heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        weights = nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / (c // self.heads) ** 0.5)
        return x + self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, t, c))


class Fused(nnx.Module):
    def __init__(self, features=16, rngs=None):
        self.patches = nnx.Conv(3, features, (4, 4), (4, 4), rngs=rngs)
        self.block = FusedAttention(features, 4, rngs)
        self.gate = nnx.Linear(features, 4 * features, rngs=rngs)
        self.back = nnx.Linear(2 * features, features, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = self.block(x.reshape(x.shape[0], -1, x.shape[-1]))
        a, b = jnp.split(self.gate(x), 2, axis=-1)
        return self.back(a * nnx.silu(b))


class SuperResolution(nnx.Module):
    """Sub-pixel convolution (Shi et al. 2016)."""

    def __init__(self, features=8, rngs=None):
        self.head = nnx.Conv(3, features, (3, 3), rngs=rngs)
        self.body = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.up = nnx.Conv(features, 4 * features, (3, 3), rngs=rngs)
        self.tail = nnx.Conv(features, 3, (3, 3), rngs=rngs)

    def __call__(self, x):
        x = self.head(x)
        x = self.up(x + self.body(nnx.relu(x)))
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
        return self.tail(x.reshape(b, 2 * h, 2 * w, c // 4))


MODELS = {
    "mixer": Mixer,
    "unet": UNet,
    "mobilenet": MobileNet,
    "densenet": DenseNet,
    "transformer": Transformer,
    "fused": Fused,
    "super-resolution": SuperResolution,
}
