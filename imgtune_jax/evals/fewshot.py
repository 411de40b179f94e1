"""Few-shot classification in closed form, as big_vision measures it (`evaluators/fewshot_lsr`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Int

from imgtune_jax.data import Source
from imgtune_jax.evals.checks import check_finite
from imgtune_jax.evals.linear_probe import labelled_features
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.evals.ridge import Ridge

BIAS = 100.0  # a constant feature this large is hardly regularised


def draw_shots(
    labels: Int[np.ndarray, " n"], *, shots: int, num_classes: int, seed: int
) -> Int[np.ndarray, " k"]:
    """`shots` examples of every class. More shots of one seed hold all those of fewer.

    Raises ValueError naming the classes that have too few.
    """
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:shots] for c in range(num_classes)]
    short = {c: len(rows) for c, rows in enumerate(drawn) if len(rows) < shots}
    if short:
        raise ValueError(
            f"{shots} shots wanted, but {len(short)} of {num_classes} classes have fewer examples "
            f"(class: examples = {dict(list(short.items())[:5])}); lower `shots`"
        )
    return np.concatenate(drawn)


def fewshot_predictions(
    train: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    *,
    num_classes: int,
    l2: float,
) -> Int[np.ndarray, " m"]:
    """Ridge regression from standardised features to one-hot labels in {-1, 1}; the largest wins.

    Computed in float64. Mean and deviation are those of the shots.
    """
    check_finite(test, "test features")
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64) + 1e-5

    def prepared(x: np.ndarray) -> np.ndarray:
        return np.pad((x - mean) / std, [(0, 0), (0, 1)], constant_values=BIAS)

    targets = 2.0 * np.eye(num_classes)[labels] - 1.0
    ridge = Ridge.fit(prepared(train), targets, intercept=False)
    (predicted,) = ridge.predictions(prepared(test), [l2])
    return predicted.argmax(1)


@dataclass(frozen=True)
class FewShot:
    """Accuracy after a few labelled images a class, on the image tower's pooled output.

    For each number of `shots`: the mean over `seeds` draws, and each draw's own (`…_seed0`).
    """

    task: ClassVar[str] = "few_shot"

    source: Source
    train_source: Source
    num_classes: int
    shots: Sequence[int] = (1, 5, 10)
    seeds: int = 3
    l2: float = 2.0**10
    language: str = "en"

    def __call__(self, encoders: Predictor) -> dict[str, float]:
        """`5shot_acc1`, `5shot_acc1_seed0`, … in [0, 1]."""
        n = self.num_classes
        x_train, y_train = labelled_features(self.train_source, encoders=encoders, num_classes=n)
        x_test, y_test = labelled_features(self.source, encoders=encoders, num_classes=n)
        metrics: dict[str, float] = {}
        for shots in self.shots:
            accuracy = []
            for seed in range(self.seeds):
                rows = draw_shots(y_train, shots=shots, num_classes=n, seed=seed)
                predicted = fewshot_predictions(
                    x_train[rows], y_train[rows], x_test, num_classes=n, l2=self.l2
                )
                accuracy.append(float((predicted == y_test).mean()))
            metrics[f"{shots}shot_acc1"] = float(np.mean(accuracy))
            metrics |= {f"{shots}shot_acc1_seed{s}": a for s, a in enumerate(accuracy)}
        return metrics
