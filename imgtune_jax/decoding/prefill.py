"""What every search starts from: prompts read into the cache, and a step over n texts a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.types import PyTree

# (cache, token i32[b]) -> (logits f32[b v], cache); every leaf of the cache has b rows, and rows
# may stand at different positions.
DecodeStep = Callable[[PyTree, Int[Array, " b"]], tuple[Float[Array, "b v"], PyTree]]
# The same over n texts a row: (own leaves [bn ...], token i32[b n]) -> (log p f32[b n v], own).
BatchedDecodeStep = Callable[[PyTree, Int[Array, "b n"]], tuple[Float[Array, "b n v"], PyTree]]


class Prefilled(NamedTuple):
    """Rows that have read all but the last token of their prompt."""

    step: BatchedDecodeStep
    cache: PyTree  # what a text changes in the cache, [bn ...]: in any other shape, XLA copies it
    context: Int[Array, "b n t"]  # the prompt, with room for the text
    length: Int[Array, " b"]  # tokens of the prompt


def prefill(
    step: DecodeStep,
    cache: PyTree,
    prompt: Int[Array, "b p"],
    prompt_mask: Bool[Array, "b p"],
    *,
    n: int,
    max_new_tokens: int,
) -> Prefilled:
    """Read the prompts, row by row as long as they are, then lay out n texts a row.

    A leaf that `step` hands back as it came (keys and values of the image, say) is the same for all
    texts of a row, and no beam moves it. The texts are rows of one batch to the model.
    """
    length = prompt_mask.sum(1, dtype=jnp.int32)
    leaves, tree = jax.tree.flatten(cache)
    changes = _changed_leaves(step, cache, prompt[:, 0])

    def whole(own: list[Array], shared: list[Array]) -> PyTree:
        mine, same = iter(own), iter(shared)
        return tree.unflatten([next(mine if c else same) for c in changes])

    def own_of(cache: PyTree) -> list[Array]:
        return [x for c, x in zip(changes, tree.flatten_up_to(cache), strict=True) if c]

    shared = [x for c, x in zip(changes, leaves, strict=True) if not c]

    def read(i: Int[Array, ""], own: list[Array]) -> list[Array]:
        new = own_of(step(whole(own, shared), prompt[:, i])[1])
        reads = i < length - 1
        return [jnp.where(_expand_rows(reads, x), x, old) for x, old in zip(new, own, strict=True)]

    def step_n(
        own: list[Array], token: Int[Array, "b n"]
    ) -> tuple[Float[Array, "b n v"], list[Array]]:
        logits, cache = step(whole(own, _repeat_rows(shared, n)), token.reshape(-1))
        logp = jax.nn.log_softmax(logits.astype(jnp.float32))
        return logp.reshape(-1, n, logp.shape[-1]), own_of(cache)

    own = jax.lax.fori_loop(0, jnp.max(length) - 1, read, own_of(cache))
    context = jnp.pad(jnp.where(prompt_mask, prompt, 0), ((0, 0), (0, max_new_tokens)))
    return Prefilled(
        step=step_n,
        cache=_repeat_rows(own, n),
        context=jnp.repeat(context[:, None], n, axis=1),
        length=length,
    )


def append_token(
    context: Int[Array, "b n t"], position: Int[Array, "b n"], token: Int[Array, "b n"]
) -> Int[Array, "b n t"]:
    """The context with one token more; a position past its end writes nothing."""
    here = jnp.arange(context.shape[-1])[None, None] == position[..., None]
    return jnp.where(here, token[..., None], context)


def last_token(context: Int[Array, "b n t"], length: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """The last token of every context."""
    return jnp.take_along_axis(context, length[..., None] - 1, axis=-1)[..., 0]


def generated_tokens(
    context: Int[Array, "b n t"],
    prompt_length: Int[Array, " b"],
    length: Int[Array, "b n"],
    *,
    max_new_tokens: int,
    pad: int,
) -> tuple[Int[Array, "b n l"], Bool[Array, "b n l"]]:
    """What stands after the prompt, and where."""
    index = prompt_length[:, None, None] + jnp.arange(max_new_tokens, dtype=jnp.int32)[None, None]
    index = jnp.broadcast_to(index, (*context.shape[:2], max_new_tokens))
    mask = index < length[..., None]
    return jnp.where(mask, jnp.take_along_axis(context, index, axis=-1), pad), mask


def pad_prompts(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(i32[b p], bool[b p]) of token lists, padded on the right to the bucket of the longest.

    Raises ValueError for an empty prompt: a text starts after one token at least.
    """
    if empty := [i for i, p in enumerate(prompts) if not len(p)]:
        raise ValueError(f"prompts {empty[:5]} are empty; start each with one token at least (BOS)")
    lengths = np.array([len(p) for p in prompts])
    mask = np.arange(length_bucket(int(lengths.max()), least=1))[None] < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([np.asarray(p, np.int32) for p in prompts])
    return tokens, mask


def length_bucket(length: int, *, least: int = 8) -> int:
    """The compiled length that serves `length`: the next power of two."""
    return max(least, 1 << (length - 1).bit_length())


def _changed_leaves(step: DecodeStep, cache: PyTree, token: Int[Array, " b"]) -> list[bool]:
    """Which leaves of the cache a step changes, read from its program."""
    program = jax.make_jaxpr(step)(cache, token).jaxpr
    count = len(jax.tree.leaves(cache))
    return [o is not i for o, i in zip(program.outvars[-count:], program.invars, strict=False)]


def _repeat_rows(tree: PyTree, n: int) -> PyTree:
    """[b ...] as [bn ...], n equal rows for each."""
    return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), tree)


def _expand_rows(rows: Bool[Array, " b"], x: Array) -> Bool[Array, "b ..."]:
    return rows.reshape(-1, *[1] * (x.ndim - 1))
