"""What a model is made of: its components, their parameters, what of them is locked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from imgtune_jax.locking import FrozenPrefix
from imgtune_jax.models import heads, initializers, layers
from imgtune_jax.models.pooling import TowerOutput
from imgtune_jax.param_tree import param_paths
from imgtune_jax.types import MODALITIES, Batch, Params

# Each draws its parameters and its dropout by its place here.
COMPONENTS = ("image", "image_head", "text", "text_head", "decoder", "image_pooler")


@dataclasses.dataclass(frozen=True)
class ModelComponents:
    """Components and how they are run; pure functions of a parameter tree.

    A part that a model lacks is None. Parameters: the components by name, and logit_scale, which
    is the log of the multiplier, where there is a text tower; logit_bias, if `logit_bias_init` is
    given. A component that a call does not run may be absent from the tree: with cached features
    there is no image tower on the device. `frozen` names components that stay in eval mode.

    `image_mean` and `image_std` are in units of 0..255; `logit_scale_init` and `logit_scale_max`
    are logs.
    """

    image: nn.Module
    text: Any  # an nn.Module or None, as are those that follow
    image_head: Any
    text_head: Any
    decoder: Any
    image_pooler: Any
    embed_dim: int | None
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    logit_scale_init: float
    logit_scale_max: float | None
    logit_bias_init: float | None
    constrain: layers.Constrain = layers.no_constraint
    frozen: frozenset[str] = frozenset()

    def init(self, key: jax.Array) -> Params:
        """Float32 parameters drawn from `key`. Runs no forward pass."""
        return _init_params(self, key)

    def components(self) -> tuple[str, ...]:
        """The names of the parts that this model has."""
        return tuple(name for name in COMPONENTS if getattr(self, name) is not None)

    def param_specs(self) -> Params:
        """The law of every component's parameters; see `init.py`."""
        return {
            name: initializers.declare(getattr(self, name), *self._abstract_inputs(name))
            for name in self.components()
        }

    def abstract_params(self) -> Params:
        """Shapes and types of `init`, without computing anything."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def feature_dim(self, tower: str = "image") -> int:
        """Width of what a tower's head reads."""
        return self._abstract_features(tower).pooled.shape[-1]

    def _abstract_inputs(self, name: str) -> tuple[Any, ...]:
        of = jax.ShapeDtypeStruct
        if name == "image":
            return (of((1, self.image_size, self.image_size, len(self.image_mean)), jnp.float32),)
        if name == "text":
            shape = (1, self.text.max_length)
            return of(shape, jnp.int32), of(shape, jnp.bool_)
        if name == "image_pooler":
            return (self._abstract_output("image").tokens,)
        if name != "decoder":
            return (self._abstract_features(name.removesuffix("_head")).pooled,)
        inputs = of((1, self.decoder.max_length - 1), jnp.int32)
        if self.decoder.input_from == "text_tower":
            inputs = jax.eval_shape(lambda x: x[:, :-1], self._abstract_output("text").tokens)
        return inputs, self._abstract_features("image").tokens

    def _abstract_output(self, name: str) -> TowerOutput:
        run = functools.partial(getattr(self, name).init_with_output, train=False)
        return jax.eval_shape(run, jax.random.key(0), *self._abstract_inputs(name))[0]

    def _abstract_features(self, tower: str) -> TowerOutput:
        pooled = tower == "image" and self.image_pooler is not None
        return self._abstract_output("image_pooler" if pooled else tower)

    def needs_tokens(self, tower: str) -> bool:
        """Does any component read a tower's tokens, not its pooled vector alone?"""
        if tower == "image":
            return self.decoder is not None or self.image_pooler is not None
        return self.decoder is not None and self.decoder.input_from == "text_tower"

    def frozen_prefix(self, tower: str) -> FrozenPrefix | None:
        """The frozen prefix of a tower, or None if it trains from its input on.

        If a component reads the tower's tokens, the prefix ends after the last layer, and pooling
        belongs to the suffix.
        """
        module = getattr(self, tower)
        if module is None:
            return None
        if tower in self.frozen:
            depth = getattr(module, "depth", -1)
            return FrozenPrefix(depth if self.needs_tokens(tower) else -1)
        n = getattr(module, "num_frozen_layers", 0)
        return FrozenPrefix(n) if n else None

    def in_frozen_prefix(self, path: str) -> bool:
        """Whether the parameter 'image/blocks_0/…' belongs to the frozen prefix of its tower."""
        tower, _, path_in_tower = path.partition("/")
        prefix = self.frozen_prefix(tower) if tower in MODALITIES else None
        return prefix is not None and prefix.contains(path_in_tower)

    def apply_frozen_prefix(
        self, params: Params, *, tower: str, batch: Batch
    ) -> Float[Array, "b ..."]:
        """The output of `frozen_prefix` on a batch, in float32: a pooled vector, or tokens [b l d]."""
        inputs = self.tower_inputs(tower, batch)
        assert inputs is not None
        prefix = self.frozen_prefix(tower)
        assert prefix is not None, f"the {tower} tower has no frozen prefix"
        if prefix.is_full_tower and not self.needs_tokens(tower):
            return self.apply_tower_eval(params, tower, inputs, lambda out: out.pooled)
        return self.apply_tower_eval(params, tower, inputs, lambda out: out, part="front")

    def apply_tower(
        self,
        params: Params,
        tower: str,
        batch: Batch,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> TowerOutput | None:
        """What a tower, and the pooler behind it, gives of a batch; None where it has no input.

        From cached features, if the batch brings them; with pooled ones, there are no tokens.
        """
        if getattr(self, tower) is None:
            return None
        inputs, features = self.tower_inputs(tower, batch), getattr(batch, f"{tower}_features")
        if features is not None and features.ndim == 2:
            return TowerOutput(features, features[:, None])
        if features is not None:
            mask: list[Any] = [batch.text_mask] if tower == "text" else []
            out = self.apply_component(
                params, tower, features, *mask, rng=rng, train=train, part="rest"
            )
        elif inputs is None:
            return None
        else:
            out = self.apply_component(params, tower, *inputs, rng=rng, train=train)
        if tower == "image" and self.image_pooler is not None:
            return self.apply_component(params, "image_pooler", out.tokens, rng=rng, train=train)
        return out

    def tower_inputs(self, tower: str, batch: Batch) -> tuple[Array, ...] | None:
        """What a tower reads of a batch. Raises ValueError for text without its mask."""
        if tower == "image":
            return None if batch.image is None else (self.normalize_images(batch.image),)
        if batch.text is None:
            return None
        if batch.text_mask is None:
            raise ValueError("a batch with text needs its text_mask; the tokenizer gives both")
        return batch.text, batch.text_mask

    def normalize_images(self, image: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """What the image tower reads."""
        mean = jnp.asarray(self.image_mean, jnp.float32).reshape(1, 1, 1, -1)
        std = jnp.asarray(self.image_std, jnp.float32).reshape(1, 1, 1, -1)
        return (image.astype(jnp.float32) - mean) / std

    def apply_component(
        self,
        params: Params,
        name: str,
        *inputs: Array,
        rng: jax.Array | None = None,
        train: bool = False,
        **options: Any,
    ) -> Any:
        """One component. Raises ValueError where the model or the parameters lack it."""
        module = getattr(self, name)
        if module is None:
            have = ", ".join(self.components())
            raise ValueError(f"this call runs the component {name!r}; this model has only {have}")
        stateless = isinstance(module, heads.IdentityHead) or options.get("part") == "rest"
        if name not in params and not stateless:
            raise ValueError(
                f"this call runs the component {name!r}, but the parameters hold only "
                f"{', '.join(sorted(params))}; pass its parameters, or cached features"
            )
        train = train and name not in self.frozen
        rngs = None
        if train and rng is not None:
            rngs = {"dropout": jax.random.fold_in(rng, COMPONENTS.index(name))}
        params = {"params": params.get(name, {})}
        return module.apply(params, *inputs, train=train, rngs=rngs, **options)

    def apply_tower_eval(
        self,
        params: Params,
        tower: str,
        inputs: tuple[Array, ...],
        pick: Callable[[Any], Array],
        **options: Any,
    ) -> Float[Array, "b ..."]:
        """What `pick` takes of a tower's output in eval mode, in float32.

        A convolutional tower runs on a CPU by parts of a batch whose maps fit the processor's
        cache; rows do not depend on each other, so the values are the same.
        """

        def one(*part: Array) -> Array:
            return pick(self.apply_component(params, tower, *part, **options)).astype(jnp.float32)

        size, b = getattr(getattr(self, tower), "CPU_BATCH", 0), len(inputs[0])
        one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
        if not (one_cpu and size and b > size and b % size == 0):
            return one(*inputs)
        parts = [x.reshape(b // size, size, *x.shape[1:]) for x in inputs]
        out = jax.lax.map(lambda part: one(*part), parts)
        return out.reshape(b, *out.shape[2:])

    def cast_frozen_kernels(self, frozen: Params) -> Params:
        """Locked parameters, matrices in the type in which products read them.

        Every product rounds its matrix to that type, so the values are the same, in half the memory
        for bfloat16. For what is not trained alone: small updates of a rounded matrix get lost.
        """

        def read(path: tuple[Any, ...], x: Array) -> Array:
            component = getattr(self, str(path[0].key), None)
            depthwise = x.ndim == 4 and x.shape[2] == 1  # runs in float32
            if getattr(path[-1], "key", None) != "kernel" or component is None or depthwise:
                return x
            return x.astype(component.dtype)

        return jax.tree_util.tree_map_with_path(read, frozen)

    def freeze(self, is_frozen: Callable[[str], bool]) -> Self:
        """The model whose locked parts run in eval mode, as locked weights must.

        `is_frozen` judges a parameter path such as 'image/blocks_3/attn/q/kernel'. A component
        with no trainable parameter is in eval mode as a whole; in a transformer, so are the
        embeddings and as many first layers as are frozen without a gap.
        """
        paths = param_paths(self.abstract_params())
        frozen, modules = set(), {}
        for name in self.components():
            own = [path for path in paths if path.startswith(f"{name}/")]
            if all(map(is_frozen, own)):
                frozen.add(name)
            module = getattr(self, name)
            if hasattr(module, "num_frozen_layers"):
                in_tower = {path.removeprefix(f"{name}/"): is_frozen(path) for path in own}
                prefix = FrozenPrefix.from_paths(in_tower)
                n = 0 if prefix is None else prefix.num_layers
                modules[name] = module.clone(num_frozen_layers=n)
        return dataclasses.replace(self, frozen=frozenset(frozen), **modules)


@functools.partial(jax.jit, static_argnums=0)
def _init_params(model: ModelComponents, key: jax.Array) -> Params:
    laws = model.param_specs()
    keys = jax.random.split(key, len(COMPONENTS))
    params: Params = {
        name: initializers.sample_params(laws[name], keys[i])
        for i, name in enumerate(COMPONENTS)
        if name in laws
    }
    if model.text is not None:
        params["logit_scale"] = jnp.asarray(model.logit_scale_init, jnp.float32)
    if model.logit_bias_init is not None:
        params["logit_bias"] = jnp.asarray(model.logit_bias_init, jnp.float32)
    return params
