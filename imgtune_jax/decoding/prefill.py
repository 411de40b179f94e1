"""Prefill: read the prompts into the cache, and repeat its rows n times.

Axis letters: b rows, n sequences per row, t positions of the context (prompt and new tokens),
v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError
from imgtune_jax.types import PyTree

# (cache, token i32[b]) -> (logits f32[b v], cache). Every leaf of the cache has b rows, and the
# rows may be at different positions.
DecodeStep = Callable[[PyTree, Int[Array, " b"]], tuple[Float[Array, "b v"], PyTree]]
# A step for n sequences per row: (cache leaves [b·n ...], token i32[b n]) -> (log p f32[b n v],
# cache leaves [b·n ...]).
BatchedDecodeStep = Callable[[PyTree, Int[Array, "b n"]], tuple[Float[Array, "b n v"], PyTree]]


class Prefilled(NamedTuple):
    """State of the rows after all tokens of their prompt except the last have been read."""

    step: BatchedDecodeStep
    cache: PyTree  # leaves that a step changes, [b·n ...]; XLA would copy other shapes
    context: Int[Array, "b n t"]  # the prompt and max_new_tokens free positions
    length: Int[Array, " b"]  # number of tokens of the prompt


def prefill(
    step: DecodeStep,
    cache: PyTree,
    prompt: Int[Array, "b p"],
    prompt_mask: Bool[Array, "b p"],
    *,
    n: int,
    max_new_tokens: int,
) -> Prefilled:
    """Read all tokens of each prompt but the last, then repeat the state for n sequences per row.

    Cache leaves that `step` returns unchanged, such as the image's keys and values, are shared by a
    row's n sequences, and beam search does not reorder them. The model processes the sequences as
    one batch of size b·n.
    """
    length = prompt_mask.sum(1, dtype=jnp.int32)
    leaves, treedef = jax.tree.flatten(cache)
    is_changed = _changed_leaves(step, cache, prompt[:, 0])
    shared = [x for changed, x in zip(is_changed, leaves, strict=True) if not changed]

    def to_cache(changed_leaves: list[Array], shared_leaves: list[Array]) -> PyTree:
        changed_iter, shared_iter = iter(changed_leaves), iter(shared_leaves)
        return treedef.unflatten([next(changed_iter if c else shared_iter) for c in is_changed])

    def to_changed_leaves(cache: PyTree) -> list[Array]:
        return [x for c, x in zip(is_changed, treedef.flatten_up_to(cache), strict=True) if c]

    def read_token(i: Int[Array, ""], state: list[Array]) -> list[Array]:
        updated = to_changed_leaves(step(to_cache(state, shared), prompt[:, i])[1])
        is_read = i < length - 1
        return [
            jnp.where(_expand_rows(is_read, new), new, old)
            for new, old in zip(updated, state, strict=True)
        ]

    def batched_step(
        state: list[Array], token: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n v"], list[Array]]:
        logits, cache = step(to_cache(state, _repeat_rows(shared, n)), token.reshape(-1))
        logp = jax.nn.log_softmax(logits.astype(jnp.float32))
        return logp.reshape(-1, n, logp.shape[-1]), to_changed_leaves(cache)

    state = jax.lax.fori_loop(0, jnp.max(length) - 1, read_token, to_changed_leaves(cache))
    context = jnp.pad(jnp.where(prompt_mask, prompt, 0), ((0, 0), (0, max_new_tokens)))
    return Prefilled(
        step=batched_step,
        cache=_repeat_rows(state, n),
        context=jnp.repeat(context[:, None], n, axis=1),
        length=length,
    )


def append_token(
    context: Int[Array, "b n t"], position: Int[Array, "b n"], token: Int[Array, "b n"]
) -> Int[Array, "b n t"]:
    """Return `context` with `token` at `position`. A position ≥ t changes nothing."""
    is_position = jnp.arange(context.shape[-1])[None, None] == position[..., None]
    return jnp.where(is_position, token[..., None], context)


def last_token(context: Int[Array, "b n t"], length: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """Return the last token of every context."""
    return jnp.take_along_axis(context, length[..., None] - 1, axis=-1)[..., 0]


def generated_tokens(
    context: Int[Array, "b n t"],
    prompt_length: Int[Array, " b"],
    length: Int[Array, "b n"],
    *,
    max_new_tokens: int,
    pad: int,
) -> tuple[Int[Array, "b n l"], Bool[Array, "b n l"]]:
    """Return the tokens after the prompt, padded to `max_new_tokens`, and their mask."""
    index = prompt_length[:, None, None] + jnp.arange(max_new_tokens, dtype=jnp.int32)[None, None]
    index = jnp.broadcast_to(index, (*context.shape[:2], max_new_tokens))
    mask = index < length[..., None]
    return jnp.where(mask, jnp.take_along_axis(context, index, axis=-1), pad), mask


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens i32[b p], mask bool[b p]), padded on the right.

    p is the length bucket of the longest prompt. Raises UserError for an empty prompt.
    """
    if empty := [i for i, tokens in enumerate(prompts) if not len(tokens)]:
        raise UserError(
            f"prompts {empty[:5]} are empty; expected at least one token each; begin them with the "
            "begin token (BOS)"
        )
    lengths = np.array([len(tokens) for tokens in prompts])
    mask = np.arange(length_bucket(int(lengths.max()), least=1))[None] < lengths[:, None]
    padded = np.zeros(mask.shape, np.int32)
    padded[mask] = np.concatenate([np.asarray(tokens, np.int32) for tokens in prompts])
    return padded, mask


def length_bucket(length: int, *, least: int = 8) -> int:
    """Round `length` up to a power of two, at least `least`, for which a program is compiled."""
    return max(least, 1 << (length - 1).bit_length())


def _changed_leaves(step: DecodeStep, cache: PyTree, token: Int[Array, " b"]) -> list[bool]:
    """Return, for each leaf of the cache, whether the jaxpr of `step` changes it."""
    jaxpr = jax.make_jaxpr(step)(cache, token).jaxpr
    count = len(jax.tree.leaves(cache))
    outputs = jaxpr.outvars[-count:]
    return [new is not old for new, old in zip(outputs, jaxpr.invars, strict=False)]


def _repeat_rows(tree: PyTree, n: int) -> PyTree:
    """Repeat every row n times: [b ...] to [bn ...]."""
    return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), tree)


def _expand_rows(rows: Bool[Array, " b"], x: Array) -> Bool[Array, "b ..."]:
    """Add axes to `rows` so that it broadcasts against `x`."""
    return rows.reshape(-1, *[1] * (x.ndim - 1))
