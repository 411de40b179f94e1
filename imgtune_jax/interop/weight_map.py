"""A weight map is a list of rules, each from some of their arrays to some of ours, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imgtune_jax.param_tree import flatten, unflatten
from imgtune_jax.types import Params

Arrays = tuple[np.ndarray, ...]
Convert = Callable[..., Arrays]


@dataclass(frozen=True)
class Rule:
    """`forward` maps the arrays named `theirs` to those named `ours`; `backward` the other way.

    `backward=None` says that the way back is lost, as where a norm was folded.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    forward: Convert
    backward: Convert | None


def _same(x: np.ndarray) -> Arrays:
    return (x,)


def _transpose(x: np.ndarray) -> Arrays:
    return (x.T,)


def _oihw_to_hwio(x: np.ndarray) -> Arrays:
    return (x.transpose(2, 3, 1, 0),)


def _hwio_to_oihw(x: np.ndarray) -> Arrays:
    return (x.transpose(3, 2, 0, 1),)


def copy_rule(theirs: str, ours: str) -> Rule:
    """The same array under another name."""
    return Rule((theirs,), (ours,), _same, _same)


def transpose_rule(theirs: str, ours: str) -> Rule:
    """A matrix stored [out in] there and [in out] here."""
    return Rule((theirs,), (ours,), _transpose, _transpose)


def linear_rules(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """torch.nn.Linear."""
    rules = [transpose_rule(f"{theirs}.weight", f"{ours}/kernel")]
    return [*rules, copy_rule(f"{theirs}.bias", f"{ours}/bias")] if bias else rules


def norm_rules(theirs: str, ours: str) -> list[Rule]:
    """torch.nn.LayerNorm."""
    return [
        copy_rule(f"{theirs}.weight", f"{ours}/scale"),
        copy_rule(f"{theirs}.bias", f"{ours}/bias"),
    ]


def conv_rule(theirs: str, ours: str) -> Rule:
    """A convolution's kernel, depthwise ones included: [o i h w] there, [h w i o] here."""
    return Rule((theirs,), (ours,), _oihw_to_hwio, _hwio_to_oihw)


def packed_attention(theirs: str, ours: str) -> list[Rule]:
    """torch.nn.MultiheadAttention with q, k, v in one `in_proj_weight` [3d d]."""
    names = ("q", "k", "v")

    def split(weight: np.ndarray) -> Arrays:
        return tuple(part.T for part in np.split(weight, 3))

    def join(*kernels: np.ndarray) -> Arrays:
        return (np.concatenate([kernel.T for kernel in kernels]),)

    def split_bias(bias: np.ndarray) -> Arrays:
        return tuple(np.split(bias, 3))

    def join_bias(*biases: np.ndarray) -> Arrays:
        return (np.concatenate(biases),)

    kernels = tuple(f"{ours}/{n}/kernel" for n in names)
    biases = tuple(f"{ours}/{n}/bias" for n in names)
    return [
        Rule((f"{theirs}.in_proj_weight",), kernels, split, join),
        Rule((f"{theirs}.in_proj_bias",), biases, split_bias, join_bias),
        *linear_rules(f"{theirs}.out_proj", f"{ours}/out"),
    ]


def folded_conv(theirs: str, batch_norm: str, ours: str, *, epsilon: float) -> Rule:
    """A bias-free convolution with the BatchNorm behind it, as one convolution with a bias.

    y = (conv(x) - mean) / sqrt(var + epsilon) · weight + bias, folded in float64.
    """
    parts = ("weight", "bias", "running_mean", "running_var")

    def fold(kernel: np.ndarray, *statistics: np.ndarray) -> Arrays:
        weight, bias, mean, variance = (np.asarray(s, np.float64) for s in statistics)
        gain = weight / np.sqrt(variance + epsilon)
        folded = kernel.transpose(2, 3, 1, 0) * gain
        return folded.astype(np.float32), (bias - mean * gain).astype(np.float32)

    sources = (f"{theirs}.weight", *(f"{batch_norm}.{part}" for part in parts))
    return Rule(sources, (f"{ours}/kernel", f"{ours}/bias"), fold, None)


def to_params(
    state: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    expected: Params,
    *,
    what: str,
    ignore: str = r"(?!)",
) -> Params:
    """Our parameter tree, float32, with the paths and shapes of `expected` (arrays or abstract).

    Names that fully match the regex `ignore` may be left over. Raises one ValueError that lists
    every missing, unexpected and misshaped key.
    """
    wanted = {path: tuple(x.shape) for path, x in flatten(expected).items()}
    known = {name for rule in rules for name in rule.theirs}
    problems = [f"missing: {name}" for name in sorted(known - state.keys())]
    extra = sorted(n for n in state.keys() - known if not re.fullmatch(ignore, n))
    problems += [f"unexpected: {name} {tuple(state[name].shape)}" for name in extra]
    flat: dict[str, np.ndarray] = {}
    for rule in rules:
        if not all(name in state for name in rule.theirs):
            continue
        arrays = [state[name] for name in rule.theirs]
        shapes = ", ".join(f"{n} {tuple(state[n].shape)}" for n in rule.theirs)
        try:
            converted = rule.forward(*arrays)
        except ValueError as error:  # reported with the others
            problems.append(f"misshaped: {shapes}: {error}")
            continue
        for path, array in zip(rule.ours, converted, strict=True):
            if wanted.get(path) != array.shape:
                problems.append(
                    f"misshaped: {shapes} gives {path} {array.shape}; want {wanted.get(path)}"
                )
            flat[path] = np.asarray(array, np.float32, order="C")
    filled = {path for rule in rules for path in rule.ours}
    problems += [f"missing: nothing fills {path}" for path in sorted(wanted.keys() - filled)]
    if problems:
        raise ValueError(f"the weights do not fit {what}:\n  " + "\n  ".join(problems))
    return unflatten(flat)


def to_state_dict(params: Params, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """Their state dict from our parameters. Raises ValueError where there is no way back."""
    flat = flatten(params)
    state: dict[str, np.ndarray] = {}
    for rule in rules:
        if rule.backward is None:
            raise ValueError(f"{', '.join(rule.theirs)}: a folded norm cannot be unfolded")
        missing = [path for path in rule.ours if path not in flat]
        if missing:
            raise ValueError(f"the parameters lack {', '.join(missing)}")
        arrays = rule.backward(*(np.asarray(flat[path]) for path in rule.ours))
        for name, array in zip(rule.theirs, arrays, strict=True):
            state[name] = np.asarray(array, order="C")
    return state
