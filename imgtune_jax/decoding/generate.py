"""From a model's step and a prompt to texts, compiled once a length bucket."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.decoding import beam, sampling
from imgtune_jax.decoding.settings import Beam, Decoding, Generated, Sample
from imgtune_jax.decoding.start import Step, bucket, start
from imgtune_jax.types import Params, PyTree

Constrain = Callable[[Array, tuple[str | None, ...]], Array]


def generate(
    step: Step,
    cache: PyTree,
    prompt: Int[Array, "b p"],
    prompt_mask: Bool[Array, "b p"],
    settings: Decoding,
    *,
    key: Array | None = None,
    limit: Int[Array, ""] | int | None = None,
) -> Generated:
    """Texts that continue the prompts; pure, and ready to be traced.

    `cache` has read nothing yet. A prompt stands at the left of its row, one token at least;
    padding is on its right. No prompt token is changed, none comes out, and no row influences
    another. `key` is for `Sample` alone. `limit`, at most max_length and that by default, may be a
    traced value. Raises ValueError for a missing or a useless key.
    """
    draws = isinstance(settings.method, Sample)
    if draws != (key is not None):
        method = type(settings.method).__name__
        raise ValueError(f"{method} {'draws: pass a key' if draws else 'draws nothing: no key'}")
    n = settings.method.width if isinstance(settings.method, Beam) else settings.method.n
    begin = start(step, cache, prompt, prompt_mask, n=n, room=settings.max_length)
    limit = jnp.asarray(settings.max_length if limit is None else limit, jnp.int32)
    if isinstance(settings.method, Beam):
        return beam.search(begin, settings, limit=limit)
    return sampling.draw(begin, settings, key=key, limit=limit)


def _no_constraint(x: Array, axes: tuple[str | None, ...]) -> Array:
    return x


@dataclass(frozen=True)
class Generator:
    """A model's way to write: `generator(params, inputs, prompt, prompt_mask) -> Generated`.

    `start(params, inputs, length=…)` gives the cache, `step(params, cache, token)` is one step of
    the model, which reads at most `longest` tokens (None: any number). `constrain` is the
    partitioner's. One program is compiled for each pair of prompt shape and length bucket of
    `settings.max_length`; results are those of the exact length.
    """

    start: Callable[..., PyTree]
    step: Callable[[Params, PyTree, Int[Array, " b"]], tuple[Float[Array, "b v"], PyTree]]
    settings: Decoding
    longest: int | None = None
    constrain: Constrain = _no_constraint

    def __call__(
        self,
        params: Params,
        inputs: Any,
        prompt: Int[Array | np.ndarray, "b p"],
        prompt_mask: Bool[np.ndarray, "b p"],
        *,
        key: Array | None = None,
    ) -> Generated:
        """As `generate`; `inputs` (image tokens, say) and the texts are sharded by batch.

        Raises ValueError for a prompt that leaves no room for max_length tokens.
        """
        limit = self.settings.max_length
        written = int(np.sum(prompt_mask, 1).max())
        if self.longest is not None and written + limit - 1 > self.longest:  # the last is not read
            raise ValueError(
                f"a prompt of {written} tokens and max_length={limit} need {written + limit - 1} "
                f"positions, and the model has {self.longest}; a max_length of at most "
                f"{max(self.longest + 1 - written, 0)} fits this prompt"
            )
        settings = dataclasses.replace(self.settings, max_length=bucket(limit))
        program = dataclasses.replace(self, settings=settings)
        out = _run(program, params, inputs, prompt, prompt_mask, key, limit)
        return out.replace(tokens=out.tokens[..., :limit], mask=out.mask[..., :limit])


@partial(jax.jit, static_argnums=0)
def _run(
    program: Generator,
    params: Params,
    inputs: Any,
    prompt: Int[Array, "b p"],
    prompt_mask: Bool[Array, "b p"],
    key: Array | None,
    limit: Int[Array, ""],
) -> Generated:
    def by_batch(x: Array) -> Array:
        return program.constrain(x, ("batch", *[None] * (x.ndim - 1)))

    length = prompt.shape[1] + program.settings.max_length
    length = length if program.longest is None else min(length, program.longest)
    cache = program.start(params, inputs, length=length)
    step = partial(program.step, params)
    prompt, prompt_mask = by_batch(prompt), by_batch(prompt_mask)
    out = generate(step, cache, prompt, prompt_mask, program.settings, key=key, limit=limit)
    return jax.tree.map(by_batch, out)
