"""Linear probe: accuracy of a linear classifier on frozen image features."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float, Int

from imgtune_jax.data import Source, Tokenizer, class_names
from imgtune_jax.errors import UserError
from imgtune_jax.evals.checks import (
    check_finite,
    check_images,
    check_label_order,
    check_labels,
    checked_labels,
)
from imgtune_jax.evals.normalize import column_scales, normalize_rows
from imgtune_jax.evals.protocol import Predictor
from imgtune_jax.evals.zeroshot import (
    classification_metric_names,
    classification_metrics,
    true_class_ranks,
)
from imgtune_jax.models import ImageTextModel


class Logistic(NamedTuple):
    """A multinomial logistic regression; the logits are `features @ weight + bias`."""

    weight: Float[np.ndarray, "d c"]
    bias: Float[np.ndarray, " c"]
    converged: bool  # the largest gradient entry is below `tol`


def fit_logistic(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    *,
    num_classes: int,
    l2: float,
    initial: Logistic | None = None,
    tol: float = 1e-4,
    max_iterations: int = 1000,
    dtype: type = np.float32,
    chunk: int = 16384,
) -> Logistic:
    """Minimize mean cross-entropy + l2/2 · ‖weight‖² by L-BFGS; the bias is not regularized.

    scikit-learn's `LogisticRegression(C=1 / (n * l2))` has the same minimum and the same default
    `tol`. The search starts from `initial` (None: zero). Loss and gradient are computed on the
    default device, `chunk` rows at a time. In float32, gradients below about 5e-5 are rounding
    noise; a lower `tol` needs float64, which is slow or missing on accelerators.
    """
    shape = (features.shape[1] + 1, num_classes)
    with jax.enable_x64(dtype == np.float64):
        data = jax.device_put(_blocks(features.astype(dtype), labels, chunk))

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = _loss_and_gradient(flat.reshape(shape).astype(dtype), *data, l2=l2)
            return float(value), np.asarray(gradient, np.float64).ravel()

        x0 = np.zeros(shape) if initial is None else np.vstack([initial.weight, initial.bias])
        result = scipy.optimize.minimize(
            objective,
            x0.astype(np.float64).ravel(),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": max_iterations,
                "maxfun": 2 * max_iterations,
                "gtol": tol,
                "ftol": 0.0,  # stop by `gtol`, or when the line search fails on rounding noise
            },
        )
    params = result.x.reshape(shape)
    return Logistic(params[:-1], params[-1], bool(np.abs(result.jac).max() <= tol))


def _blocks(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], chunk: int
) -> tuple[Float[np.ndarray, "k b e"], Int[np.ndarray, "k b"], Float[np.ndarray, "k b"]]:
    """Split into k blocks of b rows: features, labels, and weights 1/n (0 for padding).

    A 1 is appended to the features of each row (e = d + 1); it multiplies the bias.
    """
    n = len(features)
    size = min(chunk, n)
    pad = -n % size
    rows = np.pad(np.pad(features, [(0, 0), (0, 1)], constant_values=1), [(0, pad), (0, 0)])
    weights = np.pad(np.full(n, 1 / n, features.dtype), (0, pad))
    blocks = -1, size
    return (
        rows.reshape(*blocks, rows.shape[1]),
        np.pad(labels, (0, pad)).reshape(blocks),
        weights.reshape(blocks),
    )


@jax.jit
def _loss_and_gradient(
    params: Float[Array, "e c"],
    rows: Float[Array, "k b e"],
    labels: Int[Array, "k b"],
    weights: Float[Array, "k b"],
    *,
    l2: float,
) -> tuple[Float[Array, ""], Float[Array, "e c"]]:
    """Return the loss, with its l2 penalty, and the gradient, as sums over k blocks."""

    def block_loss(params, x, y, w):
        logits = jnp.matmul(x, params, precision=jax.lax.Precision.HIGHEST)
        label_logit = jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return jnp.sum(w * (jax.nn.logsumexp(logits, axis=1) - label_logit))

    def add_block(total, block):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(block_loss)(params, *block)), None

    weight = params.at[-1].set(0)  # without the bias, which is the last row
    penalty = l2 / 2 * jnp.sum(weight**2), l2 * weight
    return jax.lax.scan(add_block, penalty, (rows, labels, weights))[0]


class Scaling(enum.StrEnum):
    """Scaling of features: none, unit norm per row, or mean 0 and variance 1 per column."""

    NONE = "none"
    UNIT = "unit"
    STANDARD = "standard"

    @classmethod
    def _missing_(cls, value: object) -> Scaling:
        raise UserError(f"scaling = {value!r}; expected one of {', '.join(cls)}")


def scale_features(
    train: Float[np.ndarray, "n d"], *others: Float[np.ndarray, "m d"], scaling: Scaling
) -> list[Float[np.ndarray, "m d"]]:
    """Return all arrays, scaled. The mean and standard deviation are those of `train`.

    A row of zeros keeps norm 0, and a constant column is only centered.
    """
    arrays = [train, *others]
    for x in arrays:
        check_finite(x, "image features")
    if scaling is Scaling.UNIT:
        return [normalize_rows(x) for x in arrays]
    if scaling is Scaling.STANDARD:
        mean, divisor = column_scales(train, epsilon=1e-6)
        return [((x - mean) / divisor).astype(x.dtype) for x in arrays]
    return arrays


def sweep_l2(
    train: tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]],
    validation: tuple[Float[np.ndarray, "m d"], Int[np.ndarray, " m"]],
    *,
    num_classes: int,
    l2s: Sequence[float],
    dtype: type = np.float32,
) -> dict[float, float]:
    """Return the validation accuracy of every l2.

    The largest l2 is fitted first, and each fit starts from the solution of the previous one.
    """
    accuracy, fit = {}, None
    for l2 in sorted(l2s, reverse=True):
        fit = fit_logistic(*train, num_classes=num_classes, l2=l2, initial=fit, dtype=dtype)
        predicted = (validation[0] @ fit.weight + fit.bias).argmax(1)
        accuracy[l2] = float((predicted == validation[1]).mean())
    return accuracy


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on the image tower's pooled output, before the head.

    Of `l2s`, the l2 with the best validation accuracy is selected; ties go to the largest. The
    validation images are those of `val_source`. If it is None, they are a random `val_fraction` of
    the training images, sampled with `seed`. The final fit uses training and validation images.
    It is tested on `source`. Metric names are CLIP_benchmark's.
    """

    task: ClassVar[str] = "linear_probe"

    source: Source
    train_source: Source
    num_classes: int
    val_source: Source | None = None
    val_fraction: float = 0.1
    seed: int = 0
    l2s: tuple[float, ...] = tuple(10.0**e for e in range(-8, 1))
    scaling: Scaling = Scaling.UNIT
    language: str = "en"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", Scaling(self.scaling))
        if not self.l2s or min(self.l2s) <= 0:
            raise UserError(f"l2s = {self.l2s}; expected one or more positive numbers")
        if self.val_source is None and not 0 < self.val_fraction < 1:
            raise UserError(
                f"val_fraction = {self.val_fraction}; expected a fraction between 0 and 1, "
                "or set val_source"
            )
        for field in ("train_source", "val_source"):
            names = class_names(getattr(self, field))
            check_label_order(names, self.source, name=field)

    def __call__(self, predictor: Predictor) -> dict[str, float]:
        """Return `lp_acc1`, `lp_acc5`, …, the selected `l2`, and its accuracy `val_acc1`."""
        load_features = functools.partial(
            labeled_features, predictor=predictor, num_classes=self.num_classes
        )
        x_train, y_train = load_features(self.train_source)
        if self.val_source is None:
            order = np.random.default_rng(self.seed).permutation(len(x_train))
            val_rows, train_rows = np.split(order, [max(1, round(self.val_fraction * len(order)))])
            (x_val, y_val), (x_train, y_train) = (
                (x_train[val_rows], y_train[val_rows]),
                (x_train[train_rows], y_train[train_rows]),
            )
        else:
            x_val, y_val = load_features(self.val_source)
        x_test, y_test = load_features(self.source)
        x_train, x_val, x_test = scale_features(x_train, x_val, x_test, scaling=self.scaling)
        fit = functools.partial(fit_logistic, num_classes=self.num_classes)
        accuracy = sweep_l2(
            (x_train, y_train), (x_val, y_val), num_classes=self.num_classes, l2s=self.l2s
        )
        best_l2 = max(accuracy, key=lambda l2: (accuracy[l2], l2))
        train_and_val = np.concatenate([x_train, x_val]), np.concatenate([y_train, y_val])
        final_fit = fit(*train_and_val, l2=best_l2)
        predicted, ranks = true_class_ranks(
            _with_ones(x_test), np.vstack([final_fit.weight, final_fit.bias]).T, y_test
        )
        metrics = classification_metrics(predicted, ranks, y_test, num_classes=self.num_classes)
        return {f"lp_{name}": value for name, value in metrics.items()} | {
            "l2": best_l2,
            "val_acc1": accuracy[best_l2],
            "converged": float(final_fit.converged),
            "num_train": float(len(train_and_val[0])),
            "num_images": float(len(x_test)),
        }

    def metric_names(self) -> tuple[str, ...]:
        """Return the names of all metrics that a call may return."""
        names = classification_metric_names(self.num_classes)
        others = ("l2", "val_acc1", "converged", "num_train", "num_images")
        return (*(f"lp_{name}" for name in names), *others)

    def check(self, model: ImageTextModel, tokenizer: Tokenizer) -> None:
        """Raise UserError if the settings do not fit the sources."""
        del model, tokenizer
        for source in (self.train_source, self.val_source, self.source):
            if source is not None:
                check_labels(source, self.num_classes)
                check_images(source)


def labeled_features(
    source: Source, *, predictor: Predictor, num_classes: int
) -> tuple[Float[np.ndarray, "n d"], Int[np.ndarray, " n"]]:
    """Return the image features and labels of the readable records."""
    features, valid = predictor.image_features(source)
    return features[valid], checked_labels(source, valid, num_classes=num_classes)


def _with_ones(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n e"]:
    """Append a 1, which multiplies the bias, to each row."""
    return np.pad(x, [(0, 0), (0, 1)], constant_values=1)
