"""Conversion of texts to token ids of fixed length, by a tokenizer that is saved with the weights.

Text preprocessing that differs from that of training lowers accuracy without an error. SigLIP needs
canonicalized text, CLIP needs text cleaned in its own way, and both need the end token, even if the
text is truncated. So cleaning, length and padding are settings that are saved with the tokenizer,
and loading the tokenizer with different settings is an error.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from imgtune_jax.data import clip_bpe
from imgtune_jax.errors import UserError
from imgtune_jax.paths import user_path

SETTINGS_FILE = "imgtune_tokenizer.json"


def lower(text: str) -> str:
    """Convert to lower case and collapse white space."""
    return " ".join(text.split()).lower()


def canonicalize(text: str) -> str:
    """Clean a text as SigLIP does: "_" to space, no ASCII punctuation, then `lower`."""
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.lower().split())


CLEANINGS: dict[str, Callable[[str], str]] = {
    "none": str,
    "lower": lower,
    "canonicalize": canonicalize,
    "clip": clip_bpe.clean,
}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """`tokenizer(texts)` -> (ids i32[b l], mask bool[b l]) with l = `length`.

    The mask is True on the tokens of a text, including begin and end tokens, and False on padding.
    Of a text that is too long, the last tokens before the end token are dropped. `backend` adds the
    begin and end tokens. It is copied, so tokenizers that share one do not change each other.

    Special tokens that are written in a text, such as "<eos>", are plain text. In a prefix, they
    are special tokens.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    length: int
    pad_id: int
    cleaning: str = "none"

    def __post_init__(self) -> None:
        if self.cleaning not in CLEANINGS:
            raise UserError(f"cleaning = {self.cleaning!r}; known: {', '.join(CLEANINGS)}")
        if self.pad_id < 0 or self.backend.id_to_token(self.pad_id) is None:
            raise UserError(
                f"pad_id = {self.pad_id}, but the tokenizer has no token with this id; its ids are "
                f"0 to {self.vocab_size - 1}"
            )
        added = self.backend.num_special_tokens_to_add(False)
        if self.length <= added:
            raise UserError(
                f"length = {self.length}; expected more than {added}, the number of begin and end "
                "tokens"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the fields only, since a pickled backend loses `encode_special_tokens`."""
        return type(self), (self.backend, self.length, self.pad_id, self.cleaning)

    def __call__(
        self, texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Return token ids, padded with `pad_id`, and the mask that is False on padding."""
        if isinstance(texts, str):
            raise UserError(f"texts = {texts[:40]!r}, one string; expected a list of texts")
        rows = self._encode([self._clean(t) for t in texts])
        ids = np.full((len(rows), self.length), self.pad_id, np.int32)
        mask = np.zeros((len(rows), self.length), bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = True
        return ids, mask

    def encode_with_prefix(
        self, prefixes: Sequence[str], texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "b l"], Bool[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Encode texts with a prefix each, and return (ids, mask, target mask).

        A row is begin tokens, prefix, text and end tokens. The target mask is True on the text and
        the end tokens, which a captioner is to generate. A prefix is tokenized separately from its
        text, so its tokens do not depend on the text.
        """
        ids, mask = self(texts)
        targets = mask.copy()
        num_bos, num_eos = len(self.bos_ids), len(self.eos_ids)
        targets[:, :num_bos] = False
        prompts = {prefix: self.prompt_ids(prefix) for prefix in set(prefixes)}
        for i, prefix in enumerate(prefixes):
            prefix_ids = prompts[prefix][num_bos:]
            if not prefix_ids:
                continue
            row = ids[i][mask[i]].tolist()
            max_text = self.length - num_bos - num_eos - len(prefix_ids)
            text_ids = row[num_bos : len(row) - num_eos][:max_text]
            row = [*self.bos_ids, *prefix_ids, *text_ids, *self.eos_ids]
            ids[i] = row + [self.pad_id] * (self.length - len(row))
            mask[i] = np.arange(self.length) < len(row)
            targets[i] = mask[i] & (np.arange(self.length) >= num_bos + len(prefix_ids))
        return ids, mask, targets

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of token ids, without special tokens and with white space collapsed."""
        texts = self.backend.decode_batch([list(row) for row in rows])
        return [" ".join(text.split()) for text in texts]

    def prompt_ids(self, prefix: str = "") -> list[int]:
        """Return the ids that generation starts from: the begin tokens and the prefix.

        Raises UserError if the prefix is too long for the text to have any tokens.
        """
        prefix_ids = self._prefix_encoder.encode(self._clean(prefix), add_special_tokens=False).ids
        if len(self.bos_ids) + len(prefix_ids) + len(self.eos_ids) >= self.length:
            raise UserError(
                f"the prefix {prefix!r} fills all {self.length} tokens; use a shorter prefix or a "
                "larger tokenizer length"
            )
        return [*self.bos_ids, *prefix_ids]

    @cached_property
    def bos_ids(self) -> tuple[int, ...]:
        """Ids of the begin tokens, which precede every text."""
        return self._bos_eos[0]

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of the end tokens, which follow every text."""
        return self._bos_eos[1]

    @cached_property
    def _bos_eos(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        text_ids = self._text_encoder.encode("a", add_special_tokens=False).ids
        all_ids = self._text_encoder.encode("a").ids
        starts = [i for i in range(len(all_ids)) if all_ids[i : i + len(text_ids)] == text_ids]
        if not text_ids or not starts:
            raise UserError(
                "the tokenizer changes the tokens of a text when it adds begin and end tokens; "
                "expected one that only adds tokens before and after them"
            )
        return tuple(all_ids[: starts[0]]), tuple(all_ids[starts[0] + len(text_ids) :])

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the ids in addition to the vocabulary, ready for JSON."""
        return {"length": self.length, "pad_id": self.pad_id, "cleaning": self.cleaning}

    @property
    def fingerprint(self) -> str:
        """Digest of everything that determines the ids."""
        serialized = json.dumps([self._text_encoder.to_str(), self.settings], sort_keys=True)
        return hashlib.sha256(serialized.encode()).hexdigest()[:24]

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` and the settings, which `tokenizer_files.load_tokenizer` reads."""
        folder = user_path(folder)
        save_tokenizer_files(self._text_encoder, self.settings, folder)
        return folder

    def _clean(self, text: str) -> str:
        """Clean a text, and replace surrogates, which no tokenizer accepts, with U+FFFD."""
        if not isinstance(text, str):
            raise UserError(f"text = {text!r} ({type(text).__name__}); expected a string")
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return CLEANINGS[self.cleaning](text)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of cleaned texts, with begin and end tokens, at most `length` each."""
        rows = [encoding.ids for encoding in self._text_encoder.encode_batch_fast(texts)]
        num_bos, num_eos = len(self.bos_ids), len(self.eos_ids)
        for i, row in enumerate(rows):
            if self._special_tokens.keys().isdisjoint(row[num_bos : len(row) - num_eos]):
                continue
            # The vocabulary of some models contains the special tokens as words.
            text = texts[i]
            for token in self._special_tokens.values():
                text = text.replace(token, f"{token[0]} {token[1:]}")
            row = self._text_encoder.encode(text).ids
            text_ids = row[num_bos : len(row) - num_eos]
            plain_ids = [j for j in text_ids if j not in self._special_tokens]
            rows[i] = [*self.bos_ids, *plain_ids, *self.eos_ids]
        return rows

    @cached_property
    def _text_encoder(self) -> tokenizers.Tokenizer:
        """A copy of the backend that encodes special tokens in a text as plain text."""
        encoder = _copy_backend(self.backend)
        encoder.enable_truncation(self.length)
        encoder.encode_special_tokens = True
        return encoder

    @cached_property
    def _prefix_encoder(self) -> tokenizers.Tokenizer:
        """A copy of the backend that encodes special tokens in a prefix as such."""
        encoder = _copy_backend(self.backend)
        encoder.no_truncation()
        return encoder

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        """The special tokens by id, without the unknown token, which a text may contain."""
        model = json.loads(self.backend.to_str())["model"]
        unknown = {model.get("unk_token"), model.get("unk_id")}
        return {
            i: token.content
            for i, token in self.backend.get_added_tokens_decoder().items()
            if token.special and i not in unknown and token.content not in unknown
        }


def _copy_backend(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    return copy


def save_tokenizer_files(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], folder: Path
) -> None:
    """Write `tokenizer.json` and the settings to a folder, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n")
