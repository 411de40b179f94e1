"""Settings of text generation, and its result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from flax import struct
from jaxtyping import Array, Bool, Float, Int

from imgtune_jax.errors import UserError


@dataclass(frozen=True)
class Greedy:
    """The most likely token at every step; ties go to the lowest id."""

    n: ClassVar[int] = 1


@dataclass(frozen=True)
class BeamSearch:
    """Beam search with `width` hypotheses per row; the best `n` are returned.

    Finished hypotheses are ranked by `log p / length ** length_penalty`, as in Transformers. With a
    penalty of 0, log p is summed over the tokens, and with 1 it is averaged. A row ends when none
    of its alive hypotheses can score higher than the worst of its `width` finished ones. With
    `exhaustive`, the best score at any length up to the limit is compared. By default, only the
    score at the current length is compared, which is a heuristic (Transformers'
    `early_stopping=False`).
    """

    width: int = 4
    n: int = 1
    length_penalty: float = 1.0
    exhaustive: bool = False

    def __post_init__(self) -> None:
        """Raise UserError unless 1 <= n <= width and the length penalty is finite."""
        if not 1 <= self.n <= self.width:
            raise UserError(f"beam: n = {self.n}, width = {self.width}; expected 1 <= n <= width")
        if not math.isfinite(self.length_penalty):
            raise UserError(
                f"beam: length_penalty = {self.length_penalty}; expected a finite number"
            )


@dataclass(frozen=True)
class Sampling:
    """`n` independent samples from softmax(log p / temperature), truncated to likely tokens.

    Keep the `top_k` likeliest tokens, then, after renormalization, the smallest set of them with
    total probability at least `top_p` (nucleus sampling, 1904.09751). Ties go to the lowest id.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raise UserError for a value out of range."""
        _check(
            "sample",
            (self.n >= 1, f"n = {self.n}; expected at least 1"),
            (
                self.temperature > 0,
                f"temperature = {self.temperature}; expected > 0 (for the limit 0, use the method "
                "'greedy')",
            ),
            (self.top_k is None or self.top_k >= 1, f"top_k = {self.top_k}; expected None or >= 1"),
            (0 < self.top_p <= 1, f"top_p = {self.top_p}; expected 0 < top_p <= 1"),
        )


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of generation. Lengths count new tokens, without the prompt.

    A sequence ends with its first stop token (a token of `stop_ids`), or after `max_new_tokens`
    tokens, which include the stop token. At least `min_new_tokens` tokens precede a stop token.
    `repetition_penalty` multiplies the log probability of every token that occurs in the prompt or
    the sequence so far (CTRL, 1909.05858). It is not applied to the logits, so that an offset of
    the logits has no effect. With `no_repeat_ngram_size = n`, no n-gram occurs twice in the prompt
    followed by the sequence.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int = 64
    method: Greedy | BeamSearch | Sampling = Greedy()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None
    pad_id: int = 0  # fills the positions after the end of a sequence

    def __post_init__(self) -> None:
        """Raise UserError for a value out of range."""
        _check(
            "decoding",
            (len(self.stop_ids) > 0, "stop_ids = (); expected at least one token id"),
            (
                self.max_new_tokens >= 1,
                f"max_new_tokens = {self.max_new_tokens}; expected at least 1",
            ),
            (
                0 <= self.min_new_tokens < self.max_new_tokens,
                f"min_new_tokens = {self.min_new_tokens}; expected 0 <= min_new_tokens < "
                f"{self.max_new_tokens} (max_new_tokens)",
            ),
            (
                self.repetition_penalty > 0,
                f"repetition_penalty = {self.repetition_penalty}; expected > 0 (1: no penalty)",
            ),
            (
                self.no_repeat_ngram_size is None or self.no_repeat_ngram_size >= 1,
                f"no_repeat_ngram_size = {self.no_repeat_ngram_size}; expected None or >= 1",
            ),
        )


@struct.dataclass
class GeneratedTokens:
    """n generated sequences of at most l tokens for each of b rows.

    `tokens` are the new tokens, including the stop token, followed by `pad_id` where `mask` is
    False. `logprob` is the model's log probability of the sequence, in nats. Penalties and
    temperature do not affect it. For greedy decoding and sampling, `score` is `logprob` per token.

    For beam search, `score` is the log probability with the repetition penalty, divided by
    length ** length_penalty. The sequence with the highest score comes first. If fewer than n
    sequences exist, the last ones of the row are empty, and their `logprob` and `score` are -inf.
    """

    tokens: Int[Array, "b n l"]
    mask: Bool[Array, "b n l"]
    logprob: Float[Array, "b n"]
    score: Float[Array, "b n"]


def _check(name: str, *checks: tuple[bool, str]) -> None:
    """Raise UserError with the messages of all checks that are False."""
    if errors := [message for ok, message in checks if not ok]:
        raise UserError(f"{name}: " + "; ".join(errors))
