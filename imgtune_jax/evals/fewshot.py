"""Few-shot classification by ridge regression, as in big_vision (`evaluators/fewshot_lsr`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from imgtune_jax.data import Source, Tokenizer, class_names
from imgtune_jax.errors import UserError
from imgtune_jax.evals.checks import check_finite, check_images, check_label_order, check_labels
from imgtune_jax.evals.linear_probe import labeled_features
from imgtune_jax.evals.normalize import column_scales
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.evals.ridge import Ridge
from imgtune_jax.models import ImageTextModel

BIAS = 100.0  # value of the constant feature; so large that its weight is barely regularized


def sample_shots(
    labels: Int[np.ndarray, " n"], *, shots: int, num_classes: int, seed: int
) -> Int[np.ndarray, " k"]:
    """Sample `shots` examples of every class; return their row numbers.

    With the same seed, a larger sample contains the smaller ones. Raises UserError that names the
    classes with fewer than `shots` examples.
    """
    rng = np.random.default_rng(seed)
    by_class = [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in range(num_classes)]
    too_few = {c: len(rows) for c, rows in enumerate(by_class) if len(rows) < shots}
    if too_few:
        raise UserError(
            f"shots = {shots}, but {len(too_few)} of {num_classes} classes have fewer examples "
            f"(class: examples = {dict(list(too_few.items())[:5])}); lower `shots`"
        )
    return np.concatenate(by_class)


def fewshot_predictions(
    train: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    *,
    num_classes: int,
    l2: float,
) -> Int[np.ndarray, " m"]:
    """Predict classes by ridge regression from standardized features to targets in {-1, 1}.

    The class with the largest output is predicted. Features are standardized by the mean and
    standard deviation of `train`. All computations are in float64.
    """
    check_finite(train, "training features")
    check_finite(test, "test features")
    mean, divisor = column_scales(train, epsilon=1e-5)

    def standardize(x: np.ndarray) -> np.ndarray:
        return np.pad((x - mean) / divisor, [(0, 0), (0, 1)], constant_values=BIAS)

    targets = 2.0 * np.eye(num_classes)[labels] - 1.0
    ridge = Ridge.fit(standardize(train), targets, intercept=False)
    (outputs,) = ridge.predictions(standardize(test), [l2])
    return outputs.argmax(1)


@dataclass(frozen=True)
class FewShot:
    """Accuracy after training on a few labeled images per class.

    The features are the image tower's pooled output. For each number in `shots`, `seeds` random
    samples are evaluated. The metrics are the accuracy of each sample (`…_seed0`, …) and the mean.
    """

    task: ClassVar[str] = "few_shot"

    source: Source
    train_source: Source
    num_classes: int
    shots: Sequence[int] = (1, 5, 10)
    seeds: int = 3
    l2: float = 2.0**10
    language: str = "en"

    def __post_init__(self) -> None:
        check_label_order(class_names(self.train_source), self.source, name="train_source")

    def __call__(self, predictor: Predictor) -> dict[str, float]:
        """Return `5shot_acc1`, `5shot_acc1_seed0`, … in [0, 1]."""
        n = self.num_classes
        x_train, y_train = labeled_features(self.train_source, predictor=predictor, num_classes=n)
        x_test, y_test = labeled_features(self.source, predictor=predictor, num_classes=n)
        metrics: dict[str, float] = {}
        for shots in self.shots:
            accuracy = []
            for seed in range(self.seeds):
                rows = sample_shots(y_train, shots=shots, num_classes=n, seed=seed)
                predicted = fewshot_predictions(
                    x_train[rows], y_train[rows], x_test, num_classes=n, l2=self.l2
                )
                accuracy.append(float((predicted == y_test).mean()))
            metrics[f"{shots}shot_acc1"] = float(np.mean(accuracy))
            metrics |= {f"{shots}shot_acc1_seed{s}": a for s, a in enumerate(accuracy)}
        return metrics

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics that a call may return."""
        means = [f"{shots}shot_acc1" for shots in self.shots]
        return (*means, *(f"{name}_seed{s}" for name in means for s in range(self.seeds)))

    def check(self, model: ImageTextModel, tokenizer: Tokenizer) -> None:
        """Raise UserError if the settings do not fit the sources."""
        del model, tokenizer
        for source in (self.train_source, self.source):
            check_labels(source, self.num_classes)
            check_images(source)
