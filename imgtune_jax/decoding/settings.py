"""What a decoder is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from flax import struct
from jaxtyping import Array, Bool, Float, Int


@dataclass(frozen=True)
class Greedy:
    """The most likely token at every step; of equals, the one with the lowest id."""

    n: ClassVar[int] = 1


@dataclass(frozen=True)
class BeamSearch:
    """Beam search: the best `n` of what `width` hypotheses grow into.

    Finished hypotheses are ordered by `log p / length ** length_penalty` (Transformers' formula;
    0 is the plain sum, 1 the mean a token). A row ends when the worst of its `width` finished ones
    beats whatever its live ones could become: at their present length (a heuristic, Transformers'
    `early_stopping=False`), or, if `exhaustive`, at any length up to the longest.
    """

    width: int = 4
    n: int = 1
    length_penalty: float = 1.0
    exhaustive: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError unless 1 <= n <= width."""
        if not 1 <= self.n <= self.width:
            raise ValueError(f"beam: n = {self.n} of width = {self.width}; wanted 1 <= n <= width")


@dataclass(frozen=True)
class Sampling:
    """`n` independent draws from softmax(log p / temperature), cut to its likeliest tokens.

    `top_k` keeps so many tokens; then `top_p` keeps the fewest whose probability is at least that
    (nucleus sampling, 1904.09751). Of equals, tokens with lower ids stay.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raise ValueError for a number that is out of its range."""
        _check(
            "sample",
            (self.n >= 1, f"n = {self.n}; wanted at least 1"),
            (
                self.temperature > 0,
                f"temperature = {self.temperature}; wanted > 0 (its limit 0 is the greedy method)",
            ),
            (self.top_k is None or self.top_k >= 1, f"top_k = {self.top_k}; wanted None or >= 1"),
            (0 < self.top_p <= 1, f"top_p = {self.top_p}; wanted in (0, 1]"),
        )


@dataclass(frozen=True)
class GenerationConfig:
    """How a text is chosen. Lengths count new tokens: the prompt is not among them.

    A text ends with the first token of `stop`, or after `max_new_tokens` tokens (the stop token is
    counted). At least `min_new_tokens` tokens come before a stop token. Every token that the prompt or
    the text so far holds has its log p multiplied by `repetition_penalty` (CTRL, 1909.05858, on log
    probabilities, so that only the distribution matters and not its logits' offset). No n-gram of
    `no_repeat_ngram_size` tokens occurs twice in prompt and text together.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int = 64
    method: Greedy | BeamSearch | Sampling = Greedy()
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int | None = None
    pad_id: int = 0  # what stands after a text's end

    def __post_init__(self) -> None:
        """Raise ValueError for a number that is out of its range."""
        _check(
            "decoding",
            (len(self.stop_ids) > 0, "stop is empty; wanted the id of one stop token at least"),
            (
                self.max_new_tokens >= 1,
                f"max_new_tokens = {self.max_new_tokens}; wanted at least 1",
            ),
            (
                0 <= self.min_new_tokens < self.max_new_tokens,
                f"min_new_tokens = {self.min_new_tokens}; wanted 0 <= min_new_tokens < {self.max_new_tokens}",
            ),
            (
                self.repetition_penalty > 0,
                f"repetition_penalty = {self.repetition_penalty}; wanted > 0 (1 is none)",
            ),
            (
                self.no_repeat_ngram_size is None or self.no_repeat_ngram_size >= 1,
                f"no_repeat_ngram_size = {self.no_repeat_ngram_size}; wanted None or >= 1",
            ),
        )


@struct.dataclass
class GeneratedTokens:
    """New tokens of n texts a row, the stop token among them; after it, `Decoding.pad`.

    `logprob` is the model's own log p of the tokens under `mask`, in nats, summed: no penalty or
    temperature changes it. Beam search gives the best text first, by `score` = log p with the
    repetition penalty, divided by length ** length_penalty; where fewer than n texts exist, a row
    ends with empty ones whose logprob and score are -inf. Elsewhere `score` is `logprob` a token.
    """

    tokens: Int[Array, "b n l"]
    mask: Bool[Array, "b n l"]
    logprob: Float[Array, "b n"]
    score: Float[Array, "b n"]


def _check(what: str, *checks: tuple[bool, str]) -> None:
    wrong: Iterable[str] = [message for ok, message in checks if not ok]
    if wrong:
        raise ValueError(f"{what}: " + "; ".join(wrong))
