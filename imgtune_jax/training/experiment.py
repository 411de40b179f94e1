"""Everything that a config determines: mesh, model, locking, data, optimizer, evaluators, step.

Training, evaluation, inference and benchmarks build the same `Experiment`, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from imgtune_jax import data, evals, interop, locking, models, objectives, param_tree, xla_cpu
from imgtune_jax.config import ComponentConfig, Config, Duration
from imgtune_jax.errors import UserError
from imgtune_jax.evals.predictor import ModelPredictor
from imgtune_jax.partition import Partitioner, make_mesh
from imgtune_jax.training import optim, state, workdir_files
from imgtune_jax.training.step import TrainStep, make_train_step
from imgtune_jax.types import MODALITIES, Batch, Outputs, Params, TrainState

# Initialization folds this constant into the run's PRNG key; step n of training folds in n.
INIT_KEY = 0x1417


@dataclass(frozen=True)
class StepCounts:
    """The config's durations in steps; None means never."""

    total: int
    warmup: int
    cooldown: int
    timescale: int | None
    eval_every: int | None
    checkpoint_every: int | None

    @classmethod
    def from_config(cls, config: Config, num_examples: int) -> StepCounts:
        """Convert the config's durations to steps, for a data set of `num_examples`."""

        def steps(duration: Duration) -> int | None:
            return duration.in_steps(batch_size=config.batch_size, num_examples=num_examples)

        return cls(
            total=steps(config.total) or 0,
            warmup=steps(config.optim.warmup) or 0,
            cooldown=steps(config.optim.cooldown) or 0,
            timescale=steps(config.optim.timescale),
            eval_every=steps(config.eval_every),
            checkpoint_every=steps(config.checkpoint.every),
        )


@dataclass(frozen=True)
class Experiment:
    """All parts of a run except its parameters, which methods take as arguments.

    The fields suffice for inference. Parts that only training or evaluation needs, such as the data
    source, are properties that are built on first use.
    """

    config: Config
    partitioner: Partitioner
    model: models.ImageTextModel  # frozen modules run in evaluation mode
    is_frozen: dict[str, bool]  # by parameter path
    preprocess: data.Compose  # PIL image or array -> u8[h w 3], deterministic
    tokenizer: data.Tokenizer

    @cached_property
    def key(self) -> jax.Array:
        """The PRNG key of the run, from which initialization and steps derive theirs."""
        return jax.random.key(self.config.seed)

    @cached_property
    def abstract_params(self) -> Params:
        """ShapeDtypeStructs of all parameters."""
        return jax.eval_shape(self.model.init, self.key)

    @cached_property
    def abstract_split_params(self) -> tuple[Params, Params]:
        """(trainable, frozen) trees of ShapeDtypeStructs with shardings."""
        with_shardings = state.with_shardings(self.abstract_params, self.partitioner)
        return self.split_params(with_shardings)

    @cached_property
    def abstract_state(self) -> TrainState:
        """The TrainState as ShapeDtypeStructs with shardings, for restoring a checkpoint."""
        return state.abstract_train_state(
            self.abstract_split_params[0],
            self.optimizer,
            self.partitioner,
            with_ema=self.config.optim.ema_decay is not None,
        )

    @cached_property
    def source(self) -> data.Source:
        """The training records."""
        return data.build_source(self.config.data.source)

    @cached_property
    def step_counts(self) -> StepCounts:
        """The config's durations in steps, given the number of training records."""
        return StepCounts.from_config(self.config, len(self.source))

    @cached_property
    def pipeline(self) -> data.Pipeline:
        """The training batches of this host, without cached features."""
        config = self.config
        return data.Pipeline(
            source=self.source,
            transform=data.build_transform(config.data.transforms or config.preprocess),
            tokenizer=self.tokenizer,
            caption_weights=config.data.caption_weights,
            prefixes=config.data.prefixes,
            length_buckets=config.data.length_buckets,
            batch_size=config.batch_size,
            seed=config.seed,
            shuffle=True,
            rows=self.partitioner.host_rows(config.batch_size),
            num_threads=config.data.num_threads,
            num_workers=config.data.num_workers,
            prefetch=config.data.prefetch,
            max_bad_fraction=config.data.max_bad_fraction,
            max_bad_fraction_after=config.data.max_bad_fraction_after,
        )

    @cached_property
    def optimizer(self) -> optim.Optimizer:
        """The gradient transformation with its schedule."""
        steps = self.step_counts
        return optim.build_optimizer(
            self.config.optim,
            list(self.is_frozen),
            total=steps.total,
            warmup=steps.warmup,
            cooldown=steps.cooldown,
            timescale=steps.timescale,
        )

    @cached_property
    def objective(self) -> objectives.Objective:
        """The weighted sum of the config's objectives."""
        return objectives.build_objective(self.config.objectives, mesh=self.partitioner.mesh)

    @cached_property
    def evaluators(self) -> dict[str, evals.Evaluator]:
        """The evaluators that run during and after training, by name."""
        return self.build_evaluators(self.config.evals)

    @cached_property
    def baselines(self) -> dict[str, evals.Evaluator]:
        """The evaluators that run once, before the first step, by name."""
        return self.build_evaluators(self.config.baselines)

    @cached_property
    def train_step(self) -> TrainStep:
        """The jitted training step.

        It donates its input state. Its output state has the shardings of `abstract_state`.
        """

        def forward(params: Params, batch: Batch, rng: jax.Array) -> Outputs:
            return self.model.apply(params, batch, rng=rng, train=True)

        step = make_train_step(
            forward,
            self.objective,
            self.optimizer,
            key=self.key,
            accumulation=self.config.accumulation,
            ema_decay=self.config.optim.ema_decay,
        )
        layout = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        return jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(layout, self.partitioner.replicated),
            compiler_options=xla_cpu.compiler_options(self.partitioner.mesh),
        )

    def evaluates_after(self, step: int) -> bool:
        """Whether the evaluators run after this step."""
        steps = self.step_counts
        return bool(self.evaluators) and (step == steps.total or is_due(step, steps.eval_every))

    def image_side_is_frozen(self) -> bool:
        """Whether image tower and pooler are frozen, so that an image's features never change."""
        prefixes = ("image/", "image_pooler/")
        return all(frozen for path, frozen in self.is_frozen.items() if path.startswith(prefixes))

    def load_pretrained(self) -> dict[str, Params]:
        """Load the pretrained towers of config.weights, as NumPy arrays by tower."""
        pretrained = {}
        for modality in MODALITIES:
            weights: Mapping[str, Any] = getattr(self.config.weights, modality)
            if weights and getattr(self.model, modality) is None:
                raise UserError(
                    f"config.weights.{modality} = {dict(weights)}, but the model has no "
                    f"{modality} tower; set config.weights.{modality} to {{}}, or add "
                    f"config.model.{modality}"
                )
            if weights:
                model_cfg = self.config.model
                pretrained[modality] = interop.load_tower(
                    weights,
                    model_cfg[modality],
                    image_size=model_cfg["image_size"],
                    image_mean=model_cfg["image_mean"],
                    image_std=model_cfg["image_std"],
                    preprocess=self.config.preprocess,
                )
        return pretrained

    def init_params(self, pretrained: Mapping[str, Params] | None = None) -> Params:
        """Initialize all parameters on the mesh.

        `pretrained` is the result of `load_pretrained`, which is called if it is None.
        """
        if pretrained is None:
            pretrained = self.load_pretrained()
        key = jax.random.fold_in(self.key, INIT_KEY)
        return state.init_params(self.model.init, key, self.partitioner, pretrained)

    def split_params(self, params: Params) -> tuple[Params, Params]:
        """Split parameters into (trainable, frozen) trees."""
        return param_tree.split(params, self.is_frozen)

    def create_state(self, trainable: Params) -> TrainState:
        """Create the TrainState of step 0."""
        return state.create_train_state(trainable, self.optimizer, self.abstract_state)

    def build_evaluators(self, cfg: Mapping[str, ComponentConfig]) -> dict[str, evals.Evaluator]:
        """Build evaluators by name.

        A validation loss (`name="loss"`) without `objective` evaluates the training objectives.
        """
        objective = self.config.objectives
        with_objective = {
            name: {"objective": objective, **fields} if fields.get("name") == "loss" else fields
            for name, fields in cfg.items()
        }
        return evals.build_evaluators(with_objective, mesh=self.partitioner.mesh)

    def predictor(self, params: Params, *, use_memo: bool = True) -> ModelPredictor:
        """Return the model with these parameters, as evaluators and users call it.

        With `use_memo`, the predictor keeps results that evaluators share, such as the image
        features of a data set, in memory.
        """
        return ModelPredictor.build(
            self.model,
            params,
            preprocess=self.preprocess,
            tokenizer=self.tokenizer,
            partitioner=self.partitioner,
            image_side_is_frozen=self.image_side_is_frozen(),
            use_memo=use_memo,
        )


def is_due(step: int, every: int | None) -> bool:
    """Whether `step` is a multiple of `every`; None means never."""
    return every is not None and step % every == 0


def build_experiment(config: Config, *, tokenizer_dir: Path | None = None) -> Experiment:
    """Build the experiment of a config, whose paths it makes absolute.

    With `tokenizer_dir`, a run's copy of its tokenizer, the tokenizer is loaded from that folder
    instead of from the config's path or package.

    Raises UserError if parts of the config do not fit each other.
    """
    config = workdir_files.recorded_config(config)
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
        raise UserError(
            "config.tokenizer has no begin token, which config.model.decoder needs to predict the "
            "first token of a caption; use a tokenizer that has one, or set config.tokenizer."
            "begin_token, for T5's tokenizers to '<pad>'"
        )
    if config.data.length_buckets and depends_on_padding(model.text):
        raise UserError(
            f"config.data.length_buckets = {config.data.length_buckets}, but the outputs of a text "
            "tower that reads its padding (mask_padding=False or shifted_class_mask=True) change "
            "with the padded length; set length_buckets=()"
        )
    return Experiment(
        config=config,
        partitioner=partitioner,
        model=model.freeze(is_frozen.__getitem__),
        is_frozen=is_frozen,
        preprocess=data.build_transform(config.preprocess),
        tokenizer=tokenizer,
    )


def depends_on_padding(text_tower: Any) -> bool:
    """Whether the outputs of a text tower change with the length that texts are padded to.

    `shifted_class_mask` is the attention mask of open_clip's CoCa, with which the class token
    attends to the first padding token.
    """
    ignores_padding = getattr(text_tower, "mask_padding", True) or getattr(
        text_tower, "causal", False
    )
    return not ignores_padding or getattr(text_tower, "shifted_class_mask", False)
