"""An image tower, a text tower, a head on each, one scale (and bias): CLIP, LiT, SigLIP."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt8

from imgtune_jax.models import heads, init
from imgtune_jax.models.stack import count_frozen_layers, is_front
from imgtune_jax.types import Batch, Outputs, Params

TOWERS = ("image", "text")
COMPONENTS = ("image", "image_head", "text", "text_head")


def param_paths(params: Params) -> list[str]:
    """'image/blocks_3/attn/q/kernel', … of a parameter tree, concrete or abstract."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return ["/".join(str(entry.key) for entry in path) for path, _ in leaves]


def unit_norm(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """x / max(|x|, 1e-12) in float32; a zero row stays zero and has a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def clamp_log_scale(t: Float[Array, ""], maximum: float) -> Float[Array, ""]:
    """min(t, maximum), whose gradient above the maximum only ever leads back down.

    A plain minimum has none there: once past the bound, a scale could never return.
    """
    return jnp.minimum(t, maximum)


def _clamp_forward(t: Array, maximum: float) -> tuple[Array, Array]:
    return jnp.minimum(t, maximum), t


def _clamp_backward(maximum: float, t: Array, g: Array) -> tuple[Array]:
    return (jnp.where((t < maximum) | (g > 0), g, 0.0),)


clamp_log_scale.defvjp(_clamp_forward, _clamp_backward)


@dataclasses.dataclass(frozen=True)
class TwoTower:
    """Two encoders into one space; pure functions of a parameter tree.

    Parameters: {"image", "image_head", "text", "text_head", "logit_scale", "logit_bias"}, where
    logit_scale is the log of the multiplier and logit_bias is there if `logit_bias_init` is given.
    A component whose input a call does not need may be absent from the tree: with cached features
    there is no image tower on the device. `frozen` names components that stay in eval mode.

    `image_mean` and `image_std` are in units of 0..255; `logit_scale_init` and `logit_scale_max`
    are logs.
    """

    image: nn.Module
    text: nn.Module
    image_head: nn.Module
    text_head: nn.Module
    embed_dim: int
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    logit_scale_init: float
    logit_scale_max: float | None
    logit_bias_init: float | None
    frozen: frozenset[str] = frozenset()

    def init(self, key: jax.Array) -> Params:
        """Float32 parameters drawn from `key`. Runs no forward pass."""
        return _draw(self, key)

    def laws(self) -> Params:
        """The law of every tower's and head's parameters; see `init.py`."""
        laws: Params = {}
        for tower in ("image", "text"):
            features = jax.ShapeDtypeStruct((1, self.feature_dim(tower)), jnp.float32)
            head = f"{tower}_head"
            laws[tower] = init.declare(getattr(self, tower), *self._abstract_inputs(tower))
            laws[head] = init.declare(getattr(self, head), features)
        return laws

    def abstract_params(self) -> Params:
        """Shapes and types of `init`, without computing anything."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def feature_dim(self, tower: str = "image") -> int:
        """Width of a tower's pooled vector, which its head reads (and a cache stores)."""
        module = getattr(self, tower)
        run = functools.partial(module.init_with_output, train=False)
        output, _ = jax.eval_shape(run, jax.random.key(0), *self._abstract_inputs(tower))
        return output.pooled.shape[-1]

    def _abstract_inputs(self, tower: str) -> tuple[jax.ShapeDtypeStruct, ...]:
        if tower == "image":
            shape = (1, self.image_size, self.image_size, len(self.image_mean))
            return (jax.ShapeDtypeStruct(shape, jnp.float32),)
        shape = (1, self.text.max_length)
        return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)

    def apply(
        self, params: Params, batch: Batch, *, rng: jax.Array | None = None, train: bool = False
    ) -> Outputs:
        """Embeddings of what the batch holds. `rng` is needed to train with dropout.

        `batch.image_features` and `batch.text_features`, where given, are what `front` gave.
        """
        embs = []
        for tower in TOWERS:
            pooled = self._pooled(params, tower, batch, rng, train)
            head = f"{tower}_head"
            embs.append(None if pooled is None else self._head(params, head, pooled, rng, train))
        image_emb, text_emb = embs
        return Outputs(image_emb, text_emb, self.logit_scale(params), self.logit_bias(params))

    def cut(self, tower: str) -> int | None:
        """What of a tower is locked without a gap from its input on, so that it can be cached.

        -1 is all of it, n its first n layers, None nothing.
        """
        if tower in self.frozen:
            return -1
        return getattr(getattr(self, tower), "num_frozen_layers", 0) or None

    def is_front(self, path: str) -> bool:
        """Does a parameter belong to the front of a tower, which `cut` measures?"""
        tower, _, rest = path.partition("/")
        cut = self.cut(tower) if tower in TOWERS else None
        return cut is not None and is_front(rest, cut)

    def front(self, params: Params, *, tower: str, batch: Batch) -> Float[Array, "b ..."]:
        """What `cut` describes, on a batch, in float32: a pooled vector, or tokens [b l d]."""
        inputs = self._inputs(tower, batch)
        assert inputs is not None
        if self.cut(tower) == -1:
            return self._inferred(params, tower, *inputs)
        out = self._apply(params, tower, *inputs, rng=None, train=False, part="front")
        return out.astype(jnp.float32)

    def _pooled(
        self, params: Params, tower: str, batch: Batch, rng: jax.Array | None, train: bool
    ) -> Float[Array, "b e"] | None:
        features = getattr(batch, f"{tower}_features")
        if features is None:
            inputs = self._inputs(tower, batch)
            if inputs is None:
                return None
            return self._apply(params, tower, *inputs, rng=rng, train=train).pooled
        if features.ndim == 2:
            return features
        mask = [batch.text_mask] if tower == "text" else []
        return self._apply(params, tower, features, *mask, rng=rng, train=train, part="rest").pooled

    def _inputs(self, tower: str, batch: Batch) -> tuple[Array, ...] | None:
        if tower == "image":
            return None if batch.image is None else (self._normalised(batch.image),)
        if batch.text is None:
            return None
        if batch.text_mask is None:
            raise ValueError("a batch with text needs its text_mask; the tokenizer gives both")
        return batch.text, batch.text_mask

    def logit_scale(self, params: Params) -> Float[Array, ""]:
        """The multiplier of the logits, clamped."""
        t = params["logit_scale"].astype(jnp.float32)
        if self.logit_scale_max is not None:
            t = cast(Array, clamp_log_scale(t, self.logit_scale_max))
        return jnp.exp(t)

    def logit_bias(self, params: Params) -> Float[Array, ""] | None:
        """What is added to the logits; None if this model has no bias."""
        if self.logit_bias_init is None:
            return None
        return params["logit_bias"].astype(jnp.float32)

    def features_image(self, params: Params, image: UInt8[Array, "b h w c"]) -> Float[Array, "b e"]:
        """The image tower's pooled vector, before the head, in float32."""
        return self._inferred(params, "image", self._normalised(image))

    def features_text(
        self, params: Params, text: Int[Array, "b l"], text_mask: Bool[Array, "b l"]
    ) -> Float[Array, "b e"]:
        """The text tower's pooled vector, before the head, in float32."""
        return self._inferred(params, "text", text, text_mask)

    def features(self, params: Params, batch: Batch) -> dict[str, Float[Array, "b e"]]:
        """Both towers' pooled vectors of a batch, before the heads, in float32, by tower."""
        pooled = {t: self._pooled(params, t, batch, None, False) for t in TOWERS}
        return {t: x.astype(jnp.float32) for t, x in pooled.items() if x is not None}

    def encode_image(self, params: Params, image: UInt8[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Unit-norm embeddings of uint8 RGB images."""
        return self.encode_image_features(params, self.features_image(params, image))

    def encode_image_features(
        self, params: Params, features: Float[Array, "b e"]
    ) -> Float[Array, "b d"]:
        """Unit-norm embeddings from `features_image`'s vectors."""
        return self._head(params, "image_head", features, None, False)

    def encode_text(
        self, params: Params, text: Int[Array, "b l"], text_mask: Bool[Array, "b l"]
    ) -> Float[Array, "b d"]:
        """Unit-norm embeddings of token ids."""
        features = self.features_text(params, text, text_mask)
        return self._head(params, "text_head", features, None, False)

    def freeze(self, is_frozen: Callable[[str], bool]) -> TwoTower:
        """The model whose locked parts run in eval mode, as locked weights must.

        `is_frozen` judges a parameter path such as 'image/blocks_3/attn/q/kernel'. A component
        with no trainable parameter is in eval mode as a whole; in a transformer, so are the
        embeddings and as many first layers as are frozen without a gap.
        """
        paths = param_paths(self.abstract_params())
        frozen, towers = set(), {}
        for name in COMPONENTS:
            own = [path for path in paths if path.startswith(f"{name}/")]
            if all(map(is_frozen, own)):
                frozen.add(name)
            module = getattr(self, name)
            if hasattr(module, "num_frozen_layers"):
                tails = {path.removeprefix(f"{name}/"): is_frozen(path) for path in own}
                towers[name] = module.clone(num_frozen_layers=count_frozen_layers(tails))
        return dataclasses.replace(self, frozen=frozenset(frozen), **towers)

    def _apply(self, params: Params, name: str, *inputs, rng, train: bool, **options: Any):
        if name not in params and not isinstance(getattr(self, name), heads.Identity):
            raise ValueError(
                f"this call runs the component {name!r}, but the parameters hold only "
                f"{', '.join(sorted(params))}; pass its parameters, or cached features"
            )
        train = train and name not in self.frozen
        rngs = None
        if train and rng is not None:
            rngs = {"dropout": jax.random.fold_in(rng, COMPONENTS.index(name))}
        module = getattr(self, name)
        params = {"params": params.get(name, {})}
        return module.apply(params, *inputs, train=train, rngs=rngs, **options)

    def _inferred(self, params: Params, tower: str, *inputs: Array) -> Float[Array, "b e"]:
        """The pooled vector in eval mode, in float32.

        A convolutional tower runs on a CPU by parts of a batch whose maps fit the processor's
        cache; rows do not depend on each other, so the values are the same.
        """

        def run(*part: Array) -> Array:
            out = self._apply(params, tower, *part, rng=None, train=False)
            return out.pooled.astype(jnp.float32)

        size, b = getattr(getattr(self, tower), "CPU_BATCH", 0), len(inputs[0])
        one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
        if not (one_cpu and size and b > size and b % size == 0):
            return run(*inputs)
        parts = [x.reshape(b // size, size, *x.shape[1:]) for x in inputs]
        return jax.lax.map(lambda part: run(*part), parts).reshape(b, -1)

    def _normalised(self, image: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        mean = jnp.asarray(self.image_mean, jnp.float32).reshape(1, 1, 1, -1)
        std = jnp.asarray(self.image_std, jnp.float32).reshape(1, 1, 1, -1)
        return (image.astype(jnp.float32) - mean) / std

    def _head(
        self, params: Params, name: str, features: Array, rng: jax.Array | None, train: bool
    ) -> Array:
        return unit_norm(self._apply(params, name, features, rng=rng, train=train))


@functools.partial(jax.jit, static_argnums=0)
def _draw(model: TwoTower, key: jax.Array) -> Params:
    laws = model.laws()
    keys = jax.random.split(key, len(COMPONENTS))
    params: Params = {name: init.draw(laws[name], keys[i]) for i, name in enumerate(COMPONENTS)}
    params["logit_scale"] = jnp.asarray(model.logit_scale_init, jnp.float32)
    if model.logit_bias_init is not None:
        params["logit_bias"] = jnp.asarray(model.logit_bias_init, jnp.float32)
    return params
