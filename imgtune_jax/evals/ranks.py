"""Ranks in image-text retrieval: exact, by counting, in blocks, over any number of devices."""

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

from imgtune_jax.evals.checks import check_finite

NO_INDEX = 2**31 - 1


class Ranks(NamedTuple):
    """How many wrong candidates come before the best right one, for every query (0: none).

    `image_to_text` is in the order of the images, and -1 for an image without a caption, which is
    no query; `text_to_image` is in the order of the texts.
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

    A query's rank is the number of wrong candidates that a stable descending sort would put before
    its best right candidate: those with a greater score, and those with an equal score and a lower
    index. So a model whose embeddings have collapsed to one point scores chance, not 100 %.

    `image_of_text[j]` is the image that text j belongs to. `image_group` widens what is right:
    images of one group share their captions, in both directions (three drawings of one concept).
    Texts are split over all devices of `mesh`. Only a `chunk` x `chunk` block of scores exists at
    a time; images lie whole on each device (4 n d bytes).

    Raises ValueError for embeddings that do not fit together or are not finite (every comparison
    with a NaN is false, which would count as a first place).
    """
    groups = _checked_groups(image_emb, text_emb, image_of_text, image_group)
    devices = 1 if mesh is None else mesh.size
    programs = _programs(mesh)
    images = _SortedBlocks.of(image_emb, groups[0], chunk=chunk, multiple=1)
    texts = _SortedBlocks.of(text_emb, groups[1], chunk=chunk, multiple=devices)
    image_blocks = [programs.put_images(block) for block in images.blocks()]
    best_image, best_text = _best_positives(programs, images, texts, image_blocks)
    image_ranks = np.zeros(images.group.shape, np.int64)
    text_ranks = np.zeros(texts.group.shape, np.int64)
    for t, block in enumerate(texts.blocks()):
        text_block = programs.put_texts(block)
        of_text = programs.put_texts(best_text[t])
        ahead = [
            programs.count(programs.scores(text_block, images_i), text_block, images_i, of_text, b)
            for images_i, b in zip(image_blocks, best_image, strict=True)
        ]
        for i, (of_texts, of_images) in enumerate(jax.device_get(ahead)):
            text_ranks[t] += of_texts
            image_ranks[i] += of_images
    found = np.stack([best.score for best in best_image]) > -np.inf
    return Ranks(images.unsort(np.where(found, image_ranks, -1)), texts.unsort(text_ranks))


def _checked_groups(
    image_emb: np.ndarray,
    text_emb: np.ndarray,
    image_of_text: np.ndarray,
    image_group: np.ndarray | None,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """Number the groups from 0, for images and for texts; or say what does not fit."""
    if image_emb.ndim != 2 or text_emb.ndim != 2 or image_emb.shape[1] != text_emb.shape[1]:
        raise ValueError(
            f"image embeddings {image_emb.shape} and text embeddings {text_emb.shape} do not fit: "
            "both must be [rows, d] with one d"
        )
    image_of_text = np.asarray(image_of_text)
    n, m = len(image_emb), len(text_emb)
    if not n or not m:
        raise ValueError(f"nothing to retrieve: {n} images and {m} texts; give at least one each")
    if image_of_text.shape != (m,) or image_of_text.min() < 0 or image_of_text.max() >= n:
        raise ValueError(
            f"image_of_text has shape {image_of_text.shape} and values from "
            f"{image_of_text.min(initial=0)} to {image_of_text.max(initial=0)}; it must hold, for "
            f"each of the {m} texts, the index of one of the {n} images"
        )
    check_finite(image_emb, "image embeddings")
    check_finite(text_emb, "text embeddings")
    if image_group is None:
        return np.arange(n), image_of_text
    if np.shape(image_group) != (n,):
        raise ValueError(f"image_group has shape {np.shape(image_group)}; give one per image: {n}")
    dense = np.unique(image_group, return_inverse=True)[1]
    return dense, dense[image_of_text]


class _Block(NamedTuple):
    emb: Float[Any, "c d"]
    group: Int[Any, " c"]  # -1: padding
    index: Int[Any, " c"]  # the row's place in the caller's order, by which ties break


class _BestMatch(NamedTuple):
    """The best right candidate of each query: its score (-inf: there is none), its index."""

    score: Float[Any, " c"]
    index: Int[Any, " c"]


@dataclass(frozen=True)
class _SortedBlocks:
    """All rows of one side, sorted by group, cut into blocks of one size (the last padded)."""

    emb: Float[np.ndarray, "blocks c d"]
    group: Int[np.ndarray, "blocks c"]
    index: Int[np.ndarray, "blocks c"]

    @classmethod
    def of(cls, emb: np.ndarray, group: np.ndarray, *, chunk: int, multiple: int) -> _SortedBlocks:
        """Blocks of at most `chunk` rows, rounded up to a `multiple` that the devices divide."""
        rows = len(emb)
        size = -(-rows // -(-rows // chunk))  # even blocks: the last is not mostly padding
        size = -(-size // multiple) * multiple
        order = np.argsort(group, kind="stable").astype(np.int32)
        pad = -rows % size

        def cut(x: np.ndarray, fill: int) -> np.ndarray:
            x = np.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
            return x.reshape(-1, size, *x.shape[1:])

        emb = cut(np.asarray(emb, np.float32)[order], 0)
        return cls(emb, cut(group[order].astype(np.int32), -1), cut(order, NO_INDEX))

    def blocks(self) -> Iterator[_Block]:
        return (_Block(*x) for x in zip(self.emb, self.group, self.index, strict=True))

    def span(self, block: int) -> tuple[int, int]:
        group = self.group[block][self.group[block] >= 0]
        return int(group[0]), int(group[-1])

    def unsort(self, x: np.ndarray) -> np.ndarray:
        real = self.group >= 0
        out = np.empty(real.sum(), x.dtype)
        out[self.index[real]] = x[real]
        return out


def _best_positives(
    programs: _CompiledFns, images: _SortedBlocks, texts: _SortedBlocks, image_blocks: list[_Block]
) -> tuple[list[_BestMatch], list[_BestMatch]]:
    """The best right candidate of every image and of every text.

    Their scores are read off the blocks that are counted afterwards, never computed by another
    formula: equal embeddings then have equal scores, so a tie stays a tie. Only blocks that share
    a group are looked at; both sides are sorted by group, so these lie along a diagonal.
    """
    nothing = np.full(images.group.shape[1], -np.inf, np.float32)
    best_image = [
        _BestMatch(nothing, np.full(nothing.shape, NO_INDEX, np.int32)) for _ in image_blocks
    ]
    best_text = []
    for t, block in enumerate(texts.blocks()):
        text_block = programs.put_texts(block)
        nothing = np.full(texts.group.shape[1], -np.inf, np.float32)
        of_texts = _BestMatch(nothing, np.full(nothing.shape, NO_INDEX, np.int32))
        low, high = texts.span(t)
        for i, images_i in enumerate(image_blocks):
            if images.span(i)[0] > high or images.span(i)[1] < low:
                continue
            scores = programs.scores(text_block, images_i)
            found = jax.device_get(programs.best(scores, text_block, images_i))
            of_texts, best_image[i] = _better(of_texts, found[0]), _better(best_image[i], found[1])
        best_text.append(of_texts)
    return best_image, best_text


def _better(a: _BestMatch, b: _BestMatch) -> _BestMatch:
    """The one of two that a stable descending sort puts first."""
    ahead = (a.score > b.score) | ((a.score == b.score) & (a.index < b.index))
    return _BestMatch(np.where(ahead, a.score, b.score), np.where(ahead, a.index, b.index))


def _as_column(x: Shaped[Array, " t"]) -> Shaped[Array, "t 1"]:
    return x[:, None]


def _as_row(x: Shaped[Array, " i"]) -> Shaped[Array, "1 i"]:
    return x[None, :]


def _scores(texts: _Block, images: _Block) -> Float[Array, "t i"]:
    # HIGHEST: by default a TPU or GPU rounds the inputs of a float32 product, which moves ranks.
    scores = jnp.matmul(texts.emb, images.emb.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(_as_column(texts.group >= 0) & _as_row(images.group >= 0), scores, -jnp.inf)


def _best(
    scores: Float[Array, "t i"], texts: _Block, images: _Block
) -> tuple[_BestMatch, _BestMatch]:
    """The best right candidate within the block, for each text and for each image."""
    scores = jnp.where(_as_column(texts.group) == _as_row(images.group), scores, -jnp.inf)

    def along(axis: int, index: Array) -> _BestMatch:
        best = scores.max(axis, keepdims=True)
        at_best = (scores == best) & (best > -jnp.inf)
        return _BestMatch(best.squeeze(axis), jnp.where(at_best, index, NO_INDEX).min(axis))

    return along(1, _as_row(images.index)), along(0, _as_column(texts.index))


def _count(
    scores: Float[Array, "t i"],
    texts: _Block,
    images: _Block,
    best_text: _BestMatch,
    best_image: _BestMatch,
) -> tuple[Int[Array, " t"], Int[Array, " i"]]:
    """How many wrong ones of the block come before the best right one, by text and by image."""
    wrong = _as_column(texts.group) != _as_row(images.group)

    def ahead(best: Array, place: Array, index: Array) -> Bool[Array, "t i"]:
        return wrong & ((scores > best) | ((scores == best) & (index < place)))

    of_texts = ahead(
        _as_column(best_text.score), _as_column(best_text.index), _as_row(images.index)
    )
    of_images = ahead(_as_row(best_image.score), _as_row(best_image.index), _as_column(texts.index))
    return of_texts.sum(1, dtype=jnp.int32), of_images.sum(0, dtype=jnp.int32)


class _CompiledFns(NamedTuple):
    """The compiled block functions of one mesh: texts split over it, all else whole."""

    put_texts: Callable[[Any], Any]
    put_images: Callable[[Any], Any]
    scores: Callable[..., Any]
    best: Callable[..., Any]
    count: Callable[..., Any]


@functools.lru_cache(maxsize=4)
def _programs(mesh: Mesh | None) -> _CompiledFns:
    if mesh is None:
        put = jax.device_put
        return _CompiledFns(put, put, jax.jit(_scores), jax.jit(_best), jax.jit(_count))
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    whole = NamedSharding(mesh, PartitionSpec())
    return _CompiledFns(
        put_texts=functools.partial(jax.device_put, device=rows),
        put_images=functools.partial(jax.device_put, device=whole),
        scores=jax.jit(_scores, out_shardings=rows),
        best=jax.jit(_best, out_shardings=whole),
        count=jax.jit(_count, out_shardings=whole),
    )
