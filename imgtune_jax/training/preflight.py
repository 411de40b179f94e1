"""Checks before training: what a config can get wrong is found before the first step.

`config.py` checks single values, and `build_experiment` raises errors of the model and of locking.
The checks here need the data, the evaluators or the weights. They read a few records and compile
nothing. All of them run, and one error lists all that is wrong.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from imgtune_jax import data, evals
from imgtune_jax.data.feature_store import STORE_DTYPES
from imgtune_jax.errors import UserError
from imgtune_jax.models.pooling import POOLED_TOKENS
from imgtune_jax.objectives.contrastive import Positives
from imgtune_jax.training.experiment import Experiment
from imgtune_jax.types import MODALITIES, Batch, Params

log = logging.getLogger("imgtune_jax.training")


def check_experiment(experiment: Experiment, *, is_new: bool) -> dict[str, Params]:
    """Check an experiment, and return its pretrained towers, which a new run begins with.

    Only a new run loads pretrained towers and evaluates baselines, so only then are they checked.
    Raises UserError that lists all errors.
    """
    errors: dict[str, UserError] = {}  # by message, since a part may fail in several checks
    pretrained: dict[str, Params] = {}

    def run(check: Callable[[Experiment], Any]) -> None:
        try:
            check(experiment)
        except UserError as error:
            errors.setdefault(str(error), error)

    for check in CHECKS:
        run(check)
    if is_new:
        run(lambda experiment: pretrained.update(experiment.load_pretrained()))
        run(check_baselines)
        _warn_of_random_locked_towers(experiment)
    if not errors:  # it assumes that the parts are valid
        run(check_step)
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        raise UserError(f"the config has {len(errors)} errors:\n  " + "\n  ".join(errors))
    return pretrained


def check_trainable(experiment: Experiment) -> None:
    """Check that at least one parameter trains."""
    if all(experiment.is_frozen.values()):
        raise UserError(
            "config.lock freezes every parameter, so there is nothing to train; unlock at least one"
        )


def check_patch_dropout(experiment: Experiment) -> None:
    """Check that no patches are dropped in an image tower whose first layers are locked."""
    rate = getattr(experiment.model.image, "patch_dropout", 0.0)
    if rate and experiment.model.frozen_prefix("image") is not None:
        raise UserError(
            f"config.model.image.patch_dropout = {rate}, but the first layers of the image tower "
            "are locked and run in evaluation mode, which drops no patches; set patch_dropout=0, "
            "or unlock the tower"
        )


def check_batch_size(experiment: Experiment) -> None:
    """Check that batches divide over the devices, and that no record is its own negative."""
    config = experiment.config
    microbatch = config.batch_size // config.accumulation
    experiment.partitioner.check_batch_size(microbatch, "microbatch")
    size, num_records = config.batch_size, len(experiment.source)
    by_pair = any(
        getattr(term, "positives", None) is Positives.PAIR for _, term in experiment.objective.terms
    )
    if size > num_records and by_pair:
        raise UserError(
            f"config.batch_size = {size}, but config.data.source has {num_records} records, so a "
            "batch repeats records, and with positives = 'pair' a repeated record is its own "
            f"negative; set batch_size to at most {num_records}, or positives = 'group' and "
            "config.data.source.group"
        )


def check_images(experiment: Experiment) -> None:
    """Check that the transforms return images of the size of the model."""
    config, model = experiment.config, experiment.model
    expected = (model.image_size, model.image_size, len(model.image_mean))
    transforms = {"preprocess": config.preprocess, "data.transforms": config.data.transforms}
    for key, transform in transforms.items():
        shape = data.output_shape(data.build_transform(transform)) if transform else expected
        if shape != expected:
            raise UserError(
                f"config.{key} returns images of the shape {shape}; expected {expected}, that of "
                "config.model.image_size; resize to this size at the end, or change image_size"
            )


def check_records(experiment: Experiment) -> None:
    """Check that the pipeline can be built, and that training can use one of its records."""
    experiment.pipeline.check_records()


def check_tokenizer(experiment: Experiment) -> None:
    """Check that the model has every id of the tokenizer, which adds the tokens it needs."""
    model, tokenizer = experiment.model, experiment.tokenizer
    for name in ("text", "decoder"):
        component = getattr(model, name)
        # A larger vocabulary is usual: it is padded to a size that devices divide.
        if component is not None and tokenizer.vocab_size > component.vocab_size:
            raise UserError(
                f"config.model.{name}.vocab_size = {component.vocab_size}, but the ids of the "
                f"tokenizer are 0 to {tokenizer.vocab_size - 1}; set vocab_size to at least "
                f"{tokenizer.vocab_size}, or use the tokenizer of the weights"
            )
    pool = getattr(model.text, "pool", None)
    ids = {"begin": tokenizer.bos_ids, "end": tokenizer.eos_ids}
    token = POOLED_TOKENS.get(str(pool))
    if token is not None and not ids[token]:
        raise UserError(
            f"config.model.text.pool = {pool!r} reads the output of the {token} token, but the "
            f"tokenizer adds none; use a tokenizer that adds one, or pool = 'mean'"
        )
    for prefix in experiment.config.data.prefixes.values():
        tokenizer.prompt_ids(prefix)


def check_cache(experiment: Experiment) -> None:
    """Check the settings of the feature cache."""
    config = experiment.config
    if config.cache.path is None:
        return
    if config.cache.dtype not in STORE_DTYPES:
        raise UserError(
            f"config.cache.dtype = {config.cache.dtype!r}; expected one of "
            f"{', '.join(STORE_DTYPES)}"
        )
    is_text_cached = config.cache.text_views and experiment.model.frozen_prefix("text") is not None
    if is_text_cached and config.data.length_buckets:
        raise UserError(
            f"config.data.length_buckets = {config.data.length_buckets} with cached text features, "
            "which all have the same length; set length_buckets=() or cache.text_views=0"
        )


def check_optimizer(experiment: Experiment) -> None:
    """Check the optimizer, its schedule and its multipliers."""
    _ = experiment.optimizer


def check_step(experiment: Experiment) -> None:
    """Check that model, objectives and batches fit each other, by a step on abstract arrays.

    The outputs and the loss of the shortest and of the longest texts are traced, not computed.
    """
    lengths = (*experiment.config.data.length_buckets[:1], experiment.tokenizer.length)

    def loss(params: Params, batch: Batch) -> Any:
        outputs = experiment.model.apply(params, batch, rng=jax.random.key(0), train=True)
        return experiment.objective(outputs, batch)

    for length in lengths:
        jax.eval_shape(loss, experiment.abstract_params, _abstract_batch(experiment, length))


def _abstract_batch(experiment: Experiment, length: int) -> Batch:
    """Return a batch of texts of `length` tokens, as shapes and types."""
    size, model = experiment.config.batch_size, experiment.model

    def rows(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((size, *shape), dtype)

    return Batch(
        example_mask=rows(jnp.bool_),
        image=rows(jnp.uint8, model.image_size, model.image_size, len(model.image_mean)),
        text=rows(jnp.int32, length),
        text_mask=rows(jnp.bool_, length),
        target_mask=rows(jnp.bool_, length),
        group=rows(jnp.int32) if experiment.pipeline.has_group else None,
    )


def check_evaluators(experiment: Experiment) -> None:
    """Check the evaluators, and that no two of their curves have one name."""
    _check_each(experiment, "evals", experiment.evaluators)
    counts = collections.Counter(_curve_names(experiment))
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise UserError(
            f"two evaluators in config.evals report the curves {', '.join(repeated[:5])}; rename "
            "one of them"
        )


def check_baselines(experiment: Experiment) -> None:
    """Check the evaluators that run before the first step."""
    _check_each(experiment, "baselines", experiment.baselines)


def _check_each(
    experiment: Experiment, group: str, evaluators: Mapping[str, evals.Evaluator]
) -> None:
    """Check all evaluators of a group of the config; raise one UserError for all."""
    errors = []
    for name, evaluator in evaluators.items():
        try:
            evaluator.check(experiment.model, experiment.tokenizer)
        except UserError as error:
            errors.append(f"config.{group}.{name}: {error}")
    if errors:
        raise UserError("\n  ".join(errors))


def check_best_metric(experiment: Experiment) -> None:
    """Check that an evaluator reports the metric that selects the best checkpoints."""
    best_metric, names = experiment.config.checkpoint.best_metric, _curve_names(experiment)
    if best_metric is not None and best_metric not in names:
        raise UserError(
            f"config.checkpoint.best_metric = {best_metric!r} is not reported by any evaluator; "
            f"expected one of: {', '.join(sorted(names)) or 'none, since config.evals is empty'}"
        )


def _curve_names(experiment: Experiment) -> list[str]:
    """Return the names of the curves of all evaluators."""
    return [
        curve
        for name, evaluator in experiment.evaluators.items()
        for curve in evals.curve_names(
            dict.fromkeys(evaluator.metric_names(), 0.0), prefix=f"val/{name}/"
        )
    ]


def _warn_of_random_locked_towers(experiment: Experiment) -> None:
    config = experiment.config
    for modality in MODALITIES:
        if getattr(config.lock, modality) and not getattr(config.weights, modality):
            log.warning(
                "config.lock.%s locks a tower with random weights; set config.weights.%s to "
                "pretrained ones",
                *(modality, modality),
            )


CHECKS: tuple[Callable[[Experiment], None], ...] = (
    check_trainable,
    check_patch_dropout,
    check_batch_size,
    check_images,
    check_records,
    check_tokenizer,
    check_cache,
    check_optimizer,
    check_evaluators,
    check_best_metric,
)
