"""What a config determines before the first batch: model, locking, tokenizer, preprocessing.

Training, evaluation and use all start here, so a run is judged and used by exactly what trained it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from imgtune_jax import data, evals, interop, locking, models, param_tree
from imgtune_jax.config import ComponentConfig, Config
from imgtune_jax.evals.predictor import ModelPredictor
from imgtune_jax.partition import Partitioner, make_mesh
from imgtune_jax.training import state
from imgtune_jax.types import MODALITIES, Params


@dataclass(frozen=True)
class Experiment:
    """The static side of a run; parameters come beside it."""

    config: Config
    partitioner: Partitioner
    model: models.ImageTextModel  # locked layers run in eval mode
    is_frozen: dict[str, bool]  # by parameter path
    preprocess: data.Compose  # PIL image or array -> u8[h w 3], deterministic
    tokenizer: data.Tokenizer

    @functools.cached_property
    def key(self) -> jax.Array:
        """The run's PRNG key; parameters and steps fold their own constants into it."""
        return jax.random.key(self.config.seed)

    @functools.cached_property
    def abstract_params(self) -> Params:
        """ShapeDtypeStructs of all parameters."""
        return jax.eval_shape(self.model.init, self.key)

    def image_side_is_frozen(self) -> bool:
        """Is what gives an image's features locked, so that they depend on the image alone?"""
        sides = ("image/", "image_pooler/")
        return all(frozen for path, frozen in self.is_frozen.items() if path.startswith(sides))

    def init_params(self) -> Params:
        """All parameters, pretrained where the config says so, laid out on the mesh."""
        pretrained = {}
        for tower in MODALITIES:
            init: Mapping[str, Any] = getattr(self.config.weights, tower)
            if init:
                pretrained[tower] = interop.load_tower(
                    init, self.config.model[tower], image_size=self.config.model["image_size"]
                )
        key = jax.random.fold_in(self.key, 0x1417)  # apart from every step's key
        return state.init_params(self.model.init, key, self.partitioner, pretrained)

    def evaluators(self, cfg: Mapping[str, ComponentConfig]) -> dict[str, evals.Evaluator]:
        """Evaluators by name. A validation loss that names no objective is the training one."""
        objective = self.config.objectives
        filled = {
            name: {"objective": objective, **fields} if fields.get("name") == "loss" else fields
            for name, fields in cfg.items()
        }
        return evals.build_evaluators(filled, mesh=self.partitioner.mesh)

    def predictor(self, params: Params, *, keep: bool = True) -> ModelPredictor:
        """The model as evaluators and users see it; `keep` features of data sets between calls."""
        return ModelPredictor.build(
            self.model,
            params,
            preprocess=self.preprocess,
            tokenizer=self.tokenizer,
            partitioner=self.partitioner,
            image_side_is_frozen=self.image_side_is_frozen(),
            use_memo=keep,
        )


def build_experiment(config: Config, *, tokenizer_dir: Path | None = None) -> Experiment:
    """Build everything static. `tokenizer_dir` (a run's own copy) replaces the config's path.

    Raises ValueError where the config's parts do not fit each other.
    """
    partitioner = Partitioner(make_mesh(config.mesh))
    tokenizer_cfg = dict(config.tokenizer)
    if tokenizer_dir is not None:
        tokenizer_cfg = {k: v for k, v in tokenizer_cfg.items() if k != "package"}
        tokenizer_cfg["path"] = str(tokenizer_dir)
    model = models.build_model(config.model, partitioner)
    paths = param_tree.param_paths(jax.eval_shape(model.init, jax.random.key(0)))
    is_frozen = locking.frozen_paths(config.lock, paths)
    tokenizer = data.build_tokenizer(tokenizer_cfg)
    if model.decoder is not None and not tokenizer.bos_ids:
        raise ValueError(
            "a decoder needs a tokenizer with a begin token, or the first token of a caption is "
            "never predicted; data.train_tokenizer makes one that has it"
        )
    if config.data.length_buckets and depends_on_padding(model.text):
        raise ValueError(
            "config.data.length_buckets with a text tower that sees its padding "
            "(mask_padding=False or shifted_class_mask=True), so that its length changes values; "
            "set length_buckets=()"
        )
    return Experiment(
        config=config,
        partitioner=partitioner,
        model=model.freeze(is_frozen.__getitem__),
        is_frozen=is_frozen,
        preprocess=data.build_transform(config.preprocess),
        tokenizer=tokenizer,
    )


def depends_on_padding(text: Any) -> bool:
    """Does what a text tower gives depend on how far texts are padded?"""
    blind = getattr(text, "mask_padding", True) or getattr(text, "causal", False)
    return not blind or getattr(text, "shifted_class_mask", False)
