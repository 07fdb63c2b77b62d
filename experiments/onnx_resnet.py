"""The same ResNet-50, batch norm folded, as ONNX: what one host does with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from row_split import DEPTHS, Weights


def model(weights: Weights, size: int) -> bytes:
    """A serialised ONNX model of NCHW images."""
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, tensors = [], []

    def constant(name: str, value: Any) -> str:
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def op(kind: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"{kind}{len(nodes)}"], **attributes))
        return nodes[-1].output[0]

    def conv(x: str, path: str, stride: int = 1) -> str:
        kernel, bias = map(np.asarray, weights[path])
        edge = kernel.shape[0] // 2
        names = constant(f"{path}.w", kernel.transpose(3, 2, 0, 1)), constant(f"{path}.b", bias)
        return op("Conv", x, *names, strides=[stride] * 2, pads=[edge] * 4)

    x = op("Relu", conv("image", "conv", 2))
    x = op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    index = 0
    for stage, depth in enumerate(DEPTHS):
        for i in range(depth):
            path, stride = f"blocks.{index}", 2 if stage and i == 0 else 1
            y = op("Relu", conv(x, f"{path}.conv1"))
            y = conv(op("Relu", conv(y, f"{path}.conv2", stride)), f"{path}.conv3")
            shortcut = conv(x, f"{path}.projection", stride) if i == 0 else x
            x, index = op("Relu", op("Add", y, shortcut)), index + 1
    kernel, bias = map(np.asarray, weights["head"])
    x = op("Flatten", op("GlobalAveragePool", x))
    x = op("Gemm", x, constant("head.w", kernel), constant("head.b", bias))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, size, size])
    logits = helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, len(bias)])
    graph = helper.make_graph(nodes, "resnet50", [image], [logits], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(made)
    return made.SerializeToString()


def program(weights: Weights, size: int) -> Callable[[Any], Any]:
    """A function of an NHWC image, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model(weights, size), options, providers=["CPUExecutionProvider"]
    )
    return lambda image: session.run(None, {"image": image.transpose(0, 3, 1, 2)})[0]
