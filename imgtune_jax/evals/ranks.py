"""Exact ranks in image-text retrieval, counted in blocks of scores on any number of devices.

Axis letters: n images, m texts, d features; in one block, c rows, t texts, i images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from imgtune_jax.errors import UserError
from imgtune_jax.evals.checks import check_finite

NO_INDEX = 2**31 - 1  # of a query without a positive; the largest int32, so that it loses every tie


class Ranks(NamedTuple):
    """Number of negative candidates before the best positive one, for every query.

    `image_to_text` is in the order of the images. It is -1 for an image without a caption.
    `text_to_image` is in the order of the texts.
    """

    image_to_text: Int[np.ndarray, " n"]
    text_to_image: Int[np.ndarray, " m"]


def retrieval_ranks(
    image_emb: Float[np.ndarray, "n d"],
    text_emb: Float[np.ndarray, "m d"],
    image_of_text: Int[np.ndarray, " m"],
    *,
    image_group: Int[np.ndarray, " n"] | None = None,
    chunk: int = 1024,
    mesh: Mesh | None = None,
) -> Ranks:
    """Rank all texts for each image, and all images for each text, by the dot product in float32.

    A query's rank is the number of negatives that a stable descending sort would put before its
    best positive: those with a greater score, and those with an equal score and a lower index. A
    model whose embeddings have collapsed to one point therefore scores at chance, not 100 %.

    `image_of_text[j]` is the index of the image that text j belongs to. With `image_group`, every
    caption of a group is a positive of every image of the group, in both directions (a group is,
    for example, three drawings of one concept). Texts are sharded over all devices of `mesh`, and
    images are replicated (4 n d bytes per device). Only one `chunk` x `chunk` block of scores is in
    memory at a time.

    Raises UserError for mismatched shapes and for values that are not finite. (Every comparison
    with a NaN is false, so a query with a NaN would have rank 0.)
    """
    groups = _checked_groups(image_emb, text_emb, image_of_text, image_group)
    devices = 1 if mesh is None else mesh.size
    fns = _compile_fns(mesh)
    images = _SortedBlocks.from_rows(image_emb, groups[0], chunk=chunk, multiple=1)
    texts = _SortedBlocks.from_rows(text_emb, groups[1], chunk=chunk, multiple=devices)
    image_blocks = [fns.put_images(block) for block in images.blocks()]
    best_image, best_text = _best_positives(fns, images, texts, image_blocks)
    image_ranks = np.zeros(images.group.shape, np.int64)
    text_ranks = np.zeros(texts.group.shape, np.int64)
    for t, block in enumerate(texts.blocks()):
        text_block = fns.put_texts(block)
        text_best = fns.put_texts(best_text[t])
        counts = [
            fns.count(
                fns.scores(text_block, image_block), text_block, image_block, text_best, image_best
            )
            for image_block, image_best in zip(image_blocks, best_image, strict=True)
        ]
        for i, (per_text, per_image) in enumerate(jax.device_get(counts)):
            text_ranks[t] += per_text
            image_ranks[i] += per_image
    has_caption = np.stack([best.score for best in best_image]) > -np.inf
    return Ranks(images.unsort(np.where(has_caption, image_ranks, -1)), texts.unsort(text_ranks))


def _checked_groups(
    image_emb: np.ndarray,
    text_emb: np.ndarray,
    image_of_text: np.ndarray,
    image_group: np.ndarray | None,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """Return a group number from 0 for each image and text. Raises UserError for bad shapes."""
    if image_emb.ndim != 2 or text_emb.ndim != 2 or image_emb.shape[1] != text_emb.shape[1]:
        raise UserError(
            f"image embeddings have shape {image_emb.shape} and text embeddings {text_emb.shape}; "
            "expected [n, d] and [m, d] with the same d"
        )
    image_of_text = np.asarray(image_of_text)
    n, m = len(image_emb), len(text_emb)
    if not n or not m:
        raise UserError(f"got {n} images and {m} texts; retrieval needs at least one of each")
    if image_of_text.shape != (m,) or image_of_text.min() < 0 or image_of_text.max() >= n:
        raise UserError(
            f"image_of_text has shape {image_of_text.shape} and values from "
            f"{image_of_text.min(initial=0)} to {image_of_text.max(initial=0)}; expected, for each "
            f"of the {m} texts, the index of one of the {n} images"
        )
    check_finite(image_emb, "image embeddings")
    check_finite(text_emb, "text embeddings")
    _check_float32_range(image_emb, text_emb)
    if image_group is None:
        return np.arange(n), image_of_text
    if np.shape(image_group) != (n,):
        raise UserError(
            f"image_group has shape {np.shape(image_group)}; expected one group per image: {(n,)}"
        )
    image_number = np.unique(image_group, return_inverse=True)[1]
    return image_number, image_number[image_of_text]


def _check_float32_range(image_emb: np.ndarray, text_emb: np.ndarray) -> None:
    """Raise UserError if a score may overflow float32: no score is above the product of norms."""
    norms = [
        float(np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64).max()))
        for x in (image_emb, text_emb)
    ]
    if not max(*norms, norms[0] * norms[1]) <= float(np.finfo(np.float32).max):
        raise UserError(
            f"the largest norms are {norms[0]:.3g} (image embeddings) and {norms[1]:.3g} (text "
            "embeddings), so that scores overflow float32; expected embeddings of unit norm"
        )


class _Block(NamedTuple):
    """One block of images or of texts."""

    emb: Float[Any, "c d"]
    group: Int[Any, " c"]  # -1: padding
    index: Int[Any, " c"]  # the row's index in the caller's order, which breaks ties


class _BestMatch(NamedTuple):
    """Per query, the score and index of its best positive (-inf and NO_INDEX if it has none)."""

    score: Float[Any, " c"]
    index: Int[Any, " c"]


@dataclass(frozen=True)
class _SortedBlocks:
    """All images or all texts, sorted by group, in blocks of one size; the last one is padded."""

    emb: Float[np.ndarray, "blocks c d"]
    group: Int[np.ndarray, "blocks c"]
    index: Int[np.ndarray, "blocks c"]

    @classmethod
    def from_rows(
        cls, emb: np.ndarray, group: np.ndarray, *, chunk: int, multiple: int
    ) -> _SortedBlocks:
        """Sort, and split into equal blocks of at most `chunk` rows.

        The size of the blocks is rounded up to a multiple of `multiple`.
        """
        num_rows = len(emb)
        size = -(
            -num_rows // -(-num_rows // chunk)
        )  # equal, so that the last is not mostly padding
        size = -(-size // multiple) * multiple
        order = np.argsort(group, kind="stable").astype(np.int32)
        pad = -num_rows % size

        def split(x: np.ndarray, fill: int) -> np.ndarray:
            x = np.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
            return x.reshape(-1, size, *x.shape[1:])

        emb = split(np.asarray(emb, np.float32)[order], 0)
        return cls(emb, split(group[order].astype(np.int32), -1), split(order, NO_INDEX))

    def blocks(self) -> Iterator[_Block]:
        """Yield the blocks in order."""
        return (_Block(*x) for x in zip(self.emb, self.group, self.index, strict=True))

    def group_range(self, block: int) -> tuple[int, int]:
        """Return the lowest and the highest group in a block."""
        group = self.group[block][self.group[block] >= 0]
        return int(group[0]), int(group[-1])

    def unsort(self, x: np.ndarray) -> np.ndarray:
        """Drop padding and restore the caller's order."""
        valid = self.group >= 0
        unsorted = np.empty(valid.sum(), x.dtype)
        unsorted[self.index[valid]] = x[valid]
        return unsorted


def _best_positives(
    fns: _CompiledFns, images: _SortedBlocks, texts: _SortedBlocks, image_blocks: list[_Block]
) -> tuple[list[_BestMatch], list[_BestMatch]]:
    """Return the best positives of each image block and of each text block.

    The same compiled function computes their scores and the scores that are counted later, so that
    equal embeddings have exactly equal scores and tie. Images and texts are sorted by group, so
    only pairs of blocks whose ranges of groups overlap are computed.
    """
    best_image = [_no_match(images.group.shape[1]) for _ in image_blocks]
    best_text = []
    for t, block in enumerate(texts.blocks()):
        text_block = fns.put_texts(block)
        best = _no_match(texts.group.shape[1])
        low, high = texts.group_range(t)
        for i, image_block in enumerate(image_blocks):
            first, last = images.group_range(i)
            if first > high or last < low:
                continue
            scores = fns.scores(text_block, image_block)
            per_text, per_image = jax.device_get(fns.best(scores, text_block, image_block))
            best, best_image[i] = _better(best, per_text), _better(best_image[i], per_image)
        best_text.append(best)
    return best_image, best_text


def _no_match(size: int) -> _BestMatch:
    return _BestMatch(np.full(size, -np.inf, np.float32), np.full(size, NO_INDEX, np.int32))


def _better(a: _BestMatch, b: _BestMatch) -> _BestMatch:
    """Select, per query, the match that comes first in a stable descending sort."""
    ahead = (a.score > b.score) | ((a.score == b.score) & (a.index < b.index))
    return _BestMatch(np.where(ahead, a.score, b.score), np.where(ahead, a.index, b.index))


def _as_column(x: Shaped[Array, " t"]) -> Shaped[Array, "t 1"]:
    return x[:, None]


def _as_row(x: Shaped[Array, " i"]) -> Shaped[Array, "1 i"]:
    return x[None, :]


def _scores(texts: _Block, images: _Block) -> Float[Array, "t i"]:
    # HIGHEST: by default, a TPU or GPU rounds the inputs of a float32 product; ranks would change.
    scores = jnp.matmul(texts.emb, images.emb.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(_as_column(texts.group >= 0) & _as_row(images.group >= 0), scores, -jnp.inf)


def _best_in_block(
    scores: Float[Array, "t i"], texts: _Block, images: _Block
) -> tuple[_BestMatch, _BestMatch]:
    """Return the best positive in the block, for each text and for each image."""
    scores = jnp.where(_as_column(texts.group) == _as_row(images.group), scores, -jnp.inf)

    def best_along(axis: int, index: Array) -> _BestMatch:
        best = scores.max(axis, keepdims=True)
        at_best = (scores == best) & (best > -jnp.inf)
        return _BestMatch(best.squeeze(axis), jnp.where(at_best, index, NO_INDEX).min(axis))

    return best_along(1, _as_row(images.index)), best_along(0, _as_column(texts.index))


def _count_in_block(
    scores: Float[Array, "t i"],
    texts: _Block,
    images: _Block,
    best_text: _BestMatch,
    best_image: _BestMatch,
) -> tuple[Int[Array, " t"], Int[Array, " i"]]:
    """Count, per text and per image, the block's negatives that come before the best positive."""
    negative = _as_column(texts.group) != _as_row(images.group)

    def is_ahead(best_score: Array, best_index: Array, index: Array) -> Bool[Array, "t i"]:
        return negative & ((scores > best_score) | ((scores == best_score) & (index < best_index)))

    per_text = is_ahead(
        _as_column(best_text.score), _as_column(best_text.index), _as_row(images.index)
    )
    per_image = is_ahead(
        _as_row(best_image.score), _as_row(best_image.index), _as_column(texts.index)
    )
    return per_text.sum(1, dtype=jnp.int32), per_image.sum(0, dtype=jnp.int32)


class _CompiledFns(NamedTuple):
    """Compiled functions for one mesh. Texts and scores are sharded, all else is replicated."""

    put_texts: Callable[[Any], Any]
    put_images: Callable[[Any], Any]
    scores: Callable[..., Any]
    best: Callable[..., Any]
    count: Callable[..., Any]


@functools.lru_cache(maxsize=4)
def _compile_fns(mesh: Mesh | None) -> _CompiledFns:
    if mesh is None:
        put = jax.device_put
        return _CompiledFns(
            put, put, jax.jit(_scores), jax.jit(_best_in_block), jax.jit(_count_in_block)
        )
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    replicated = NamedSharding(mesh, PartitionSpec())
    return _CompiledFns(
        put_texts=functools.partial(jax.device_put, device=rows),
        put_images=functools.partial(jax.device_put, device=replicated),
        scores=jax.jit(_scores, out_shardings=rows),
        best=jax.jit(_best_in_block, out_shardings=replicated),
        count=jax.jit(_count_in_block, out_shardings=replicated),
    )
