"""Which checkpoints are retained."""

import pytest

from imgtune_jax.config import CheckpointConfig, Duration
from imgtune_jax.training.retention import lower_is_better, retained_steps

NEVER = Duration(None, None, None)


def checkpoint_config(metric=None, *, mode=None, last=1, best=1):
    return CheckpointConfig(
        every=NEVER, keep_last=last, keep_best=best, best_metric=metric, best_mode=mode
    )


@pytest.mark.parametrize(
    ("cfg", "retained"),
    [
        (checkpoint_config(), {50}),
        (checkpoint_config(last=2), {40, 50}),
        (checkpoint_config(last=0), {50}),
        (checkpoint_config("val/toy/acc1"), {20, 50}),
        (checkpoint_config("val/toy/acc1", best=2), {20, 40, 50}),
        (checkpoint_config("val/toy/acc1", best=0), {50}),
        (checkpoint_config("val/toy/acc1", mode="min"), {10, 50}),
        (checkpoint_config("val/toy/loss"), {10, 50}),
        (checkpoint_config("val/toy/loss", mode="max"), {20, 50}),
    ],
)
def test_newest_and_best_are_retained(cfg, retained):
    """Step 30 has no value, and step 60 is no longer saved."""
    values = {10: 0.1, 20: 0.9, 40: 0.5, 60: 2.0}
    assert retained_steps([10, 20, 30, 40, 50], cfg, values) == retained


def test_later_of_equal_values_is_better():
    cfg = checkpoint_config("val/toy/loss")
    assert retained_steps([1, 2, 3, 4], cfg, {1: 0.5, 2: 0.5, 3: 0.7}) == {2, 4}


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("val/toy/loss", True),
        ("val/toy/softmax", True),
        ("val/toy/perplexity", True),
        ("val/toy/image_to_text_median_rank", True),
        ("val/toy/image_to_text_R@1", False),
        ("val/rank/acc1", False),  # the name of the evaluator does not matter
        ("val/toy/CIDEr", False),
        ("val/toy/f1/cat", False),
    ],
)
def test_best_mode_follows_from_the_name_of_the_metric(metric, lower):
    assert lower_is_better(checkpoint_config(metric)) == lower
