"""What takes the place of a layer in somebody else's model while its computation is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

layer_p = Primitive("disco_layer")


class Unfit(Exception):
    """A layer is used in a way that ours cannot be, and must stay as it is."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Shapes:
    """A module without its numbers: what it would return for an input of some shape."""

    def __init__(self, module: nnx.Module):
        self._graph, state = nnx.split(module)
        self._state = jax.eval_shape(lambda: state)

    def __call__(self, x: Any, **keywords: Any) -> Any:
        """The shape and dtype of the result."""

        def call(state: Any, x: Any) -> Any:
            return nnx.merge(self._graph, state)(x, **keywords)  # type: ignore[operator]

        return jax.eval_shape(call, self._state, jax.ShapeDtypeStruct(x.shape, x.dtype))


class StandIn(nnx.Module):
    """Holds our layer, and when called leaves a mark where the author's would compute.

    Attributes:
      layer: ours; None while it is not built.
      path: where it is in the model.
    """

    def __init__(self, original: nnx.Module, path: str):
        self.layer: nnx.Module | None = nnx.data(None)
        self.path = path
        self._original = type(original)
        self._shapes = Shapes(original)
        self._settings = Settings(original)

    def __call__(self, x: Array, *arguments: Any, **keywords: Any) -> Array:
        if issubclass(self._original, nnx.BatchNorm) and len(arguments) == 1:
            keywords = {"use_running_average": arguments[0], **keywords}
            arguments = ()
        keywords = {name: value for name, value in keywords.items() if value is not None}
        if arguments or keywords.keys() - {"use_running_average"}:
            raise Unfit(self.path, "it is called with more than one input")
        out = self._shapes(x, **keywords)
        return layer_p.bind(
            x, path=self.path, keywords=tuple(keywords.items()), shape=out.shape, dtype=out.dtype
        )

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What the author's ``isinstance`` sees; ``type`` tells the truth."""
        return vars(self).get("_original", StandIn)

    def __getattr__(self, name: str) -> Any:
        # The author's code may ask how the layer was made, but for its weights we have no answer.
        settings = vars(self).get("_settings")
        if settings is None or name.startswith("__") or name not in settings.known:
            raise AttributeError(name)
        value = settings.known[name]
        if value is settings:
            raise Unfit(self.path, f"the model uses its `{name}` itself")
        return value


class Settings:
    """The attributes of a layer; those that are not settings are the ``Settings`` themselves."""

    def __init__(self, module: nnx.Module):
        plain = (bool, int, float, str, tuple, type(None))
        self.known = {
            name: value if isinstance(value, plain) else self
            for name, value in vars(module).items()
        }


def _transformed(values: Sequence[Any], *_: Any, path: str, **__: Any) -> Any:
    raise Unfit(path, "it is called inside jax.vmap or jax.grad")


def _alone(*_: Any, path: str, **__: Any) -> Any:
    raise Unfit(path, "layers run only when the distributed model itself is called")


layer_p.def_impl(_alone)
layer_p.def_abstract_eval(lambda x, *, shape, dtype, **_: jax.core.ShapedArray(shape, dtype))
batching.primitive_batchers[layer_p] = _transformed
ad.primitive_jvps[layer_p] = _transformed
mlir.register_lowering(layer_p, _alone)
