"""Rules that convert arrays between another codebase's names and layouts and this package's.

`theirs` is always a name in the other codebase's state dict, `ours` a parameter path in this
package.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imgtune_jax.errors import UserError
from imgtune_jax.param_tree import check_finite, flatten, unflatten
from imgtune_jax.types import Params

Arrays = tuple[np.ndarray, ...]
Convert = Callable[..., Arrays]

log = logging.getLogger("imgtune_jax.interop")


@dataclass(frozen=True)
class Rule:
    """`forward` maps the arrays named `theirs` to those named `ours`; `backward` is its inverse.

    `backward=None`: the conversion has no inverse, as for a folded BatchNorm.
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
    """Return the rule of an array of which only the name changes."""
    return Rule((theirs,), (ours,), _same, _same)


def transpose_rule(theirs: str, ours: str) -> Rule:
    """Return the rule of a matrix: theirs is [out in], ours is [in out]."""
    return Rule((theirs,), (ours,), _transpose, _transpose)


def linear_rules(theirs: str, ours: str, *, bias: bool = True) -> list[Rule]:
    """Return the rules of a torch.nn.Linear."""
    rules = [transpose_rule(f"{theirs}.weight", f"{ours}/kernel")]
    return [*rules, copy_rule(f"{theirs}.bias", f"{ours}/bias")] if bias else rules


def norm_rules(theirs: str, ours: str) -> list[Rule]:
    """Return the rules of a torch.nn.LayerNorm."""
    return [
        copy_rule(f"{theirs}.weight", f"{ours}/scale"),
        copy_rule(f"{theirs}.bias", f"{ours}/bias"),
    ]


def conv_rule(theirs: str, ours: str) -> Rule:
    """Return the rule of a convolution's kernel (also depthwise): [out in h w] to [h w in out]."""
    return Rule((theirs,), (ours,), _oihw_to_hwio, _hwio_to_oihw)


def packed_attention_rules(theirs: str, ours: str) -> list[Rule]:
    """Return the rules of a torch.nn.MultiheadAttention whose `in_proj_weight` is [3d d]."""
    names = ("q", "k", "v")

    def split(weight: np.ndarray) -> Arrays:
        return tuple(kernel.T for kernel in np.split(weight, 3))

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


def folded_conv_rule(theirs: str, batch_norm: str, ours: str, *, epsilon: float) -> Rule:
    """Return the rule that folds a convolution without bias and the BatchNorm after it into one.

    The result is a kernel and a bias, computed in float64, of the convolution
    conv'(x) = (conv(x) - mean) / sqrt(var + epsilon) · weight + bias.
    """
    norm_names = ("weight", "bias", "running_mean", "running_var")

    def fold(kernel: np.ndarray, *norm_arrays: np.ndarray) -> Arrays:
        weight, bias, mean, variance = (np.asarray(x, np.float64) for x in norm_arrays)
        gain = weight / np.sqrt(variance + epsilon)
        folded = kernel.transpose(2, 3, 1, 0) * gain
        return folded.astype(np.float32), (bias - mean * gain).astype(np.float32)

    sources = (f"{theirs}.weight", *(f"{batch_norm}.{name}" for name in norm_names))
    return Rule(sources, (f"{ours}/kernel", f"{ours}/bias"), fold, None)


def strip_shared_prefix(
    state: Mapping[str, np.ndarray], roots: Collection[str]
) -> Mapping[str, np.ndarray]:
    """Remove the prefix, such as "module.", that all names of a state dict share, and log it.

    `roots` are the first parts, before a dot, of the names without a prefix.
    """
    names, prefix = list(state), ""
    while names and all("." in name for name in names):
        first_parts = {name.partition(".")[0] for name in names}
        if len(first_parts) > 1 or first_parts <= set(roots):
            break
        prefix += f"{first_parts.pop()}."
        names = [name.partition(".")[2] for name in names]
    if not prefix:
        return state
    log.info("removed the prefix %r, which all names of the weights share", prefix)
    return {name.removeprefix(prefix): x for name, x in state.items()}


def to_params(
    state: Mapping[str, np.ndarray],
    rules: Sequence[Rule],
    expected: Params,
    *,
    what: str,
    ignore: str = r"(?!)",
) -> Params:
    """Convert a state dict to a float32 parameter tree with the paths and shapes of `expected`.

    The leaves of `expected` are arrays or ShapeDtypeStructs. A prefix that all names share is
    removed. Names in `state` that fully match the regex `ignore` need no rule. Raises one UserError
    that lists every missing, unexpected and misshaped key, or one that names the parameters that
    are not finite. `what` is the name of the model in the message.
    """
    expected_shapes = {path: tuple(x.shape) for path, x in flatten(expected).items()}
    known = {name for rule in rules for name in rule.theirs}
    state = strip_shared_prefix(state, {name.partition(".")[0] for name in known})
    problems = [f"missing: {name}" for name in sorted(known - state.keys())]
    extra = sorted(n for n in state.keys() - known if not re.fullmatch(ignore, n))
    problems += [f"unexpected: {name} {tuple(state[name].shape)}" for name in extra]
    flat: dict[str, np.ndarray] = {}
    for rule in rules:
        if all(name in state for name in rule.theirs):
            problems += _apply_rule(rule, state, expected_shapes, flat)
    filled = {path for rule in rules for path in rule.ours}
    problems += [f"missing: no rule for {path}" for path in sorted(expected_shapes.keys() - filled)]
    if problems:
        raise UserError(
            f"the weights do not fit {what}; compare the config with that of the checkpoint:\n  "
            + "\n  ".join(problems)
        )
    check_finite(flat, f"the weights of {what}")
    return unflatten(flat)


def _apply_rule(
    rule: Rule,
    state: Mapping[str, np.ndarray],
    expected_shapes: Mapping[str, tuple[int, ...]],
    flat: dict[str, np.ndarray],
) -> list[str]:
    """Add the arrays that a rule converts to `flat`; return the problems with their shapes."""
    arrays = [state[name] for name in rule.theirs]
    shapes = ", ".join(f"{n} {tuple(state[n].shape)}" for n in rule.theirs)
    try:
        converted = rule.forward(*arrays)
    except ValueError as error:  # reported together with the other problems
        return [f"misshaped: {shapes}: {error}"]
    problems = []
    for path, array in zip(rule.ours, converted, strict=True):
        shape = expected_shapes.get(path)
        if shape == array.shape:
            flat[path] = np.asarray(array, np.float32, order="C")
        else:
            problems.append(f"misshaped: {shapes} becomes {path} {array.shape}; expected {shape}")
    return problems


def to_state_dict(params: Params, rules: Iterable[Rule]) -> dict[str, np.ndarray]:
    """Convert parameters to the other codebase's state dict.

    Raises UserError for a rule without an inverse and for missing parameters.
    """
    flat = flatten(params)
    state: dict[str, np.ndarray] = {}
    for rule in rules:
        if rule.backward is None:
            raise UserError(
                f"{', '.join(rule.ours)} cannot be exported: a BatchNorm was folded into it, and "
                "the folding has no inverse"
            )
        missing = [path for path in rule.ours if path not in flat]
        if missing:
            raise UserError(f"the parameters lack {', '.join(missing)}; expected a full model")
        arrays = rule.backward(*(np.asarray(flat[path]) for path in rule.ours))
        for name, array in zip(rule.theirs, arrays, strict=True):
            state[name] = np.asarray(array, order="C")
    return state
