"""The components of a model, their parameters, and how each is applied."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, UInt8

from imgtune_jax import xla_cpu
from imgtune_jax.errors import UserError
from imgtune_jax.locking import FrozenPrefix
from imgtune_jax.models import heads, initializers
from imgtune_jax.models.pooling import TowerOutput
from imgtune_jax.param_tree import param_paths
from imgtune_jax.types import MODALITIES, Batch, Constrain, Params, no_constraint

# A component's index in this tuple selects its random keys, for parameters and for dropout.
COMPONENTS = ("image", "image_head", "text", "text_head", "decoder", "image_pooler")


@dataclasses.dataclass(frozen=True)
class ModelComponents:
    """The components of a model, and pure functions that apply them to a parameter tree.

    A component that a model lacks is None. The tree has the parameters of each component under its
    name; `logit_scale`, the log of the multiplier, if there is a text tower; and `logit_bias`, if
    `logit_bias_init` is given. A component that a call does not apply may be absent from the tree.
    For example, the image tower need not be on the device if its features are cached. `frozen`
    names the components that run in eval mode even in training.

    `image_mean` and `image_std` are in units of 0..255; `logit_scale_init` and `logit_scale_max`
    are natural logs.
    """

    image: nn.Module
    text: Any  # nn.Module | None, like the next four
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
    constrain: Constrain = no_constraint
    frozen: frozenset[str] = frozenset()

    def init(self, key: jax.Array) -> Params:
        """Sample float32 parameters from `key`, without a forward pass."""
        return _init_params(self, key)

    def components(self) -> tuple[str, ...]:
        """Return the names of the components that this model has."""
        return tuple(name for name in COMPONENTS if getattr(self, name) is not None)

    def param_specs(self) -> Params:
        """Return the distribution of every component's parameters; see `initializers.py`."""
        return {
            name: initializers.param_specs(getattr(self, name), *self._abstract_inputs(name))
            for name in self.components()
        }

    def abstract_params(self) -> Params:
        """Return the shapes and types of the parameters of `init`, without computing anything."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def feature_dim(self, tower: str = "image") -> int:
        """Return the width of a tower's features, the input of its head."""
        return self._abstract_features(tower).pooled.shape[-1]

    def _abstract_inputs(self, name: str) -> tuple[Any, ...]:
        abstract = jax.ShapeDtypeStruct
        if name == "image":
            size = self.image_size
            return (abstract((1, size, size, len(self.image_mean)), jnp.float32),)
        if name == "text":
            shape = (1, self.text.max_length)
            return abstract(shape, jnp.int32), abstract(shape, jnp.bool_)
        if name == "image_pooler":
            return (self._abstract_output("image").tokens,)
        if name != "decoder":
            return (self._abstract_features(name.removesuffix("_head")).pooled,)
        inputs = abstract((1, self.decoder.max_length - 1), jnp.int32)
        if self.decoder.input_from == "text_tower":
            inputs = jax.eval_shape(lambda x: x[:, :-1], self._abstract_output("text").tokens)
        return inputs, self._abstract_features("image").tokens

    def _abstract_output(self, name: str) -> TowerOutput:
        key = jax.random.key(0)
        rngs = {"params": key, initializers.SPEC_STREAM: key}
        run = functools.partial(getattr(self, name).init_with_output, rngs)
        return jax.eval_shape(run, *self._abstract_inputs(name))[0]

    def _abstract_features(self, tower: str) -> TowerOutput:
        pooled = tower == "image" and self.image_pooler is not None
        return self._abstract_output("image_pooler" if pooled else tower)

    def needs_tokens(self, tower: str) -> bool:
        """Return whether a component reads the tower's tokens, not only its pooled vector."""
        if tower == "image":
            return self.decoder is not None or self.image_pooler is not None
        return self.decoder is not None and self.decoder.input_from == "text_tower"

    def frozen_prefix(self, tower: str) -> FrozenPrefix | None:
        """Return the frozen prefix of a tower, or None if it has none.

        If the full tower is frozen and a component reads its tokens, the prefix ends after the last
        layer, and pooling belongs to the suffix.
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
        """Return whether the parameter 'image/blocks_0/…' is in its tower's frozen prefix."""
        tower, _, path_in_tower = path.partition("/")
        prefix = self.frozen_prefix(tower) if tower in MODALITIES else None
        return prefix is not None and prefix.contains(path_in_tower)

    def apply_frozen_prefix(
        self, params: Params, *, tower: str, batch: Batch
    ) -> Float[Array, "b ..."]:
        """Return the float32 output of a frozen prefix: pooled vectors [b d] or tokens [b l d]."""
        inputs = self.tower_inputs(tower, batch)
        assert inputs is not None
        prefix = self.frozen_prefix(tower)
        assert prefix is not None, f"the {tower} tower has no frozen prefix"
        if prefix.is_full_tower and not self.needs_tokens(tower):
            return self.apply_tower_eval(params, tower, inputs, lambda out: out.pooled)
        return self.apply_tower_eval(params, tower, inputs, lambda out: out, method="run_prefix")

    def apply_tower(
        self,
        params: Params,
        tower: str,
        batch: Batch,
        rng: jax.Array | None = None,
        train: bool = False,
    ) -> TowerOutput | None:
        """Return a tower's output, after the pooler if an image pooler exists; None without input.

        The input is the batch's cached features if there are any. If they are pooled, the output's
        tokens are the pooled vector alone, [b 1 d].
        """
        if getattr(self, tower) is None:
            return None
        inputs, features = self.tower_inputs(tower, batch), getattr(batch, f"{tower}_features")
        if features is not None and features.ndim == 2:
            return TowerOutput(features, features[:, None])
        options: dict[str, Any] = dict(rng=rng, train=train)
        if features is not None:
            mask: list[Any] = [batch.text_mask] if tower == "text" else []
            inputs, options["method"] = (features, *mask), "run_suffix"
        elif inputs is None:
            return None
        out = self.apply_component(params, tower, *inputs, **options)
        if tower == "image" and self.image_pooler is not None:
            return self.apply_component(params, "image_pooler", out.tokens, rng=rng, train=train)
        return out

    def tower_inputs(self, tower: str, batch: Batch) -> tuple[Array, ...] | None:
        """Return the inputs that a batch has for a tower, or None.

        Raises UserError for a text without its mask.
        """
        if tower == "image":
            return None if batch.image is None else (self.normalize_images(batch.image),)
        if batch.text is None:
            return None
        if batch.text_mask is None:
            raise UserError("a batch with text needs its text_mask; the tokenizer returns both")
        return batch.text, batch.text_mask

    def normalize_images(self, image: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Return (image - image_mean) / image_std, the input of the image tower."""
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
        """Apply one component; `options` go to `nn.Module.apply` and to the method that it calls.

        Raises UserError if the model or the parameters lack the component.
        """
        module = getattr(self, name)
        if module is None:
            have = ", ".join(self.components())
            raise UserError(f"this call applies the component {name!r}; this model has only {have}")
        needs_params = not (
            isinstance(module, heads.IdentityHead) or options.get("method") == "run_suffix"
        )
        if name not in params and needs_params:
            raise UserError(
                f"this call applies the component {name!r}, but the parameters hold only "
                f"{', '.join(sorted(params))}; pass its parameters, or cached features"
            )
        rngs = None
        if train and name not in self.frozen:
            options["train"] = True
            if rng is not None:
                rngs = {"dropout": jax.random.fold_in(rng, COMPONENTS.index(name))}
        return module.apply({"params": params.get(name, {})}, *inputs, rngs=rngs, **options)

    def apply_tower_eval(
        self,
        params: Params,
        tower: str,
        inputs: tuple[Array, ...],
        select: Callable[[Any], Array],
        **options: Any,
    ) -> Float[Array, "b ..."]:
        """Return `select` of the output of a tower in eval mode, in float32."""

        def run(*inputs: Array) -> Array:
            out = self.apply_component(params, tower, *inputs, **options)
            return select(out).astype(jnp.float32)

        if getattr(getattr(self, tower), "MAP_CHUNKS", False):
            return xla_cpu.map_chunks(run, *inputs)
        return run(*inputs)

    def cast_frozen_kernels(self, frozen: Params) -> Params:
        """Cast the kernels among frozen parameters to their component's `dtype`.

        Every matrix product casts its kernel to `dtype` anyway, so no output changes, and bfloat16
        kernels take half the memory. Trainable kernels must stay float32: bfloat16 ones would lose
        small updates.
        """

        def cast(path: tuple[Any, ...], x: Array) -> Array:
            component = getattr(self, str(path[0].key), None)
            depthwise = x.ndim == 4 and x.shape[2] == 1  # its convolution is in float32
            if getattr(path[-1], "key", None) != "kernel" or component is None or depthwise:
                return x
            return x.astype(component.dtype)

        return jax.tree_util.tree_map_with_path(cast, frozen)

    def freeze(self, is_frozen: Callable[[str], bool]) -> Self:
        """Return a copy of the model whose frozen parts run in eval mode.

        `is_frozen` takes a parameter path such as 'image/blocks_3/attn/q/kernel'. A component
        without trainable parameters runs in eval mode. In a partly frozen transformer, only the
        frozen prefix does: the embeddings and the contiguous frozen layers after them.
        """
        paths = param_paths(self.abstract_params())
        frozen, modules = set(), {}
        for name in self.components():
            component_paths = [path for path in paths if path.startswith(f"{name}/")]
            if all(map(is_frozen, component_paths)):
                frozen.add(name)
            module = getattr(self, name)
            if hasattr(module, "num_frozen_layers"):
                by_path = {
                    path.removeprefix(f"{name}/"): is_frozen(path) for path in component_paths
                }
                prefix = FrozenPrefix.from_paths(by_path)
                n = 0 if prefix is None else prefix.num_layers
                modules[name] = module.clone(num_frozen_layers=n)
        return dataclasses.replace(self, frozen=frozenset(frozen), **modules)


@functools.partial(jax.jit, static_argnums=0)
def _init_params(model: ModelComponents, key: jax.Array) -> Params:
    specs = model.param_specs()
    keys = jax.random.split(key, len(COMPONENTS))
    params: Params = {
        name: initializers.sample_params(specs[name], keys[i])
        for i, name in enumerate(COMPONENTS)
        if name in specs
    }
    if model.text is not None:
        params["logit_scale"] = jnp.asarray(model.logit_scale_init, jnp.float32)
    if model.logit_bias_init is not None:
        params["logit_bias"] = jnp.asarray(model.logit_bias_init, jnp.float32)
    return params
