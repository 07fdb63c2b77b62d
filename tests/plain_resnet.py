"""ResNet in plain Flax, written without the library: the oracle for whole networks."""

import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    def __init__(self, c_in, width, stride, bottleneck, *, dtype, rngs):
        def conv(c_in, c_out, k, stride=1):
            return nnx.Conv(
                c_in, c_out, (k, k), stride, padding=k // 2, use_bias=False, param_dtype=dtype,
                rngs=rngs,
            )  # fmt: skip

        def norm(features):
            norm = nnx.BatchNorm(features, momentum=0.9, param_dtype=dtype, rngs=rngs)
            norm.mean.set_value(norm.mean[...].astype(dtype))
            norm.var.set_value(norm.var[...].astype(dtype))
            return norm

        c_out = 4 * width if bottleneck else width
        self.bottleneck = bottleneck
        if bottleneck:
            self.conv1, self.norm1 = conv(c_in, width, 1), norm(width)
            self.conv2, self.norm2 = conv(width, width, 3, stride), norm(width)
            self.conv3, self.norm3 = conv(width, c_out, 1), norm(c_out)
        else:
            self.conv1, self.norm1 = conv(c_in, width, 3, stride), norm(width)
            self.conv2, self.norm2 = conv(width, width, 3), norm(width)
        self.projects = stride != 1 or c_in != c_out
        if self.projects:
            self.projection, self.projection_norm = conv(c_in, c_out, 1, stride), norm(c_out)

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        if self.bottleneck:
            y = self.norm3(self.conv3(nnx.relu(y)))
        shortcut = self.projection_norm(self.projection(x)) if self.projects else x
        return nnx.relu(y + shortcut)


class PlainResNet(nnx.Module):
    def __init__(self, name, num_classes, *, width, dtype=jnp.float32, rngs):
        self.small = name == "resnet8"  # as the CIFAR variants: 3x3 first, no pooling
        kernel, stride = ((3, 3), 1) if self.small else ((7, 7), 2)
        depths = {"resnet8": (1, 1, 1), "resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}[name]
        bottleneck = name == "resnet50"
        self.conv = nnx.Conv(
            3,
            width,
            kernel,
            stride,
            padding=kernel[0] // 2,
            use_bias=False,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(width, momentum=0.9, param_dtype=dtype, rngs=rngs)
        self.norm.mean.set_value(self.norm.mean[...].astype(dtype))
        self.norm.var.set_value(self.norm.var[...].astype(dtype))
        blocks, c_in = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                size, stride = width * 2**stage, 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(c_in, size, stride, bottleneck, dtype=dtype, rngs=rngs))
                c_in = 4 * size if bottleneck else size
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(c_in, num_classes, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        if not self.small:
            x = nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))
