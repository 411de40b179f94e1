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
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from imgtune_jax.data import clip_bpe
from imgtune_jax.errors import UserError
from imgtune_jax.package_files import package_file

SETTINGS_FILE = "imgtune_tokenizer.json"
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")


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
    begin and end tokens.
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
        self.backend.no_padding()
        self.backend.enable_truncation(self.length)

    def __call__(
        self, texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Return token ids, padded with `pad_id`, and the mask that is False on padding."""
        if isinstance(texts, str):
            raise UserError(f"texts = {texts[:40]!r}, one string; expected a list of texts")
        clean = CLEANINGS[self.cleaning]
        rows = [e.ids for e in self.backend.encode_batch_fast([clean(t) for t in texts])]
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
        for i, prefix in enumerate(prefixes):
            if not prefix:
                continue
            prefix_ids = self.prompt_ids(prefix)[num_bos:]
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
        clean = CLEANINGS[self.cleaning]
        prefix_ids = self.backend.encode(clean(prefix), add_special_tokens=False).ids
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
        text_ids = self.backend.encode("a", add_special_tokens=False).ids
        all_ids = self.backend.encode("a").ids
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
        serialized = json.dumps([self.backend.to_str(), self.settings], sort_keys=True)
        return hashlib.sha256(serialized.encode()).hexdigest()[:24]

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` and the settings; `load_tokenizer(folder)` reads them."""
        folder = Path(folder)
        save_tokenizer_files(self.backend, self.settings, folder)
        return folder


def save_tokenizer_files(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], folder: Path
) -> None:
    """Write `tokenizer.json` and the settings to a folder, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n")


def load_tokenizer(path: str | Path, **settings: Any) -> Tokenizer:
    """Load a tokenizer from a local folder or file; nothing is downloaded.

    `path` is a folder with `tokenizer.json`, a folder that `transformers` can read (`spiece.model`,
    …), a `tokenizer.json`, or CLIP's `bpe_simple_vocab_16e6.txt.gz`. `settings` are `length`,
    `pad_id` and `cleaning`. Their defaults are those saved in the folder or, for CLIP's file,
    length 77, pad_id 0 and cleaning "clip". Raises UserError if there is no tokenizer at the path,
    or if `settings` differ from the saved ones.
    """
    path = Path(path)
    settings = {k: v for k, v in settings.items() if v is not None}
    if path.name.endswith(".txt.gz") and path.is_file():
        defaults = {"length": clip_bpe.LENGTH, "pad_id": 0, "cleaning": "clip"}
        return Tokenizer(clip_bpe.build_clip_tokenizer(path), **(defaults | settings))
    backend, folder = _load_backend(path)
    settings_file = folder / SETTINGS_FILE
    saved = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
    changed = {k: (saved[k], v) for k, v in settings.items() if k in saved and saved[k] != v}
    if changed:
        raise UserError(
            f"the tokenizer in {folder} was saved with other settings: (saved, got) = {changed}; "
            "weights trained with this tokenizer need the saved settings, so do not set these"
        )
    settings = saved | settings
    if "length" not in settings:
        raise UserError(
            f"the length of the tokenizer {path} is not set; set it to the number of tokens that "
            "texts are padded or truncated to, such as 64"
        )
    if "pad_id" not in settings:
        settings["pad_id"] = _find_pad_id(backend, folder)
    return Tokenizer(backend, **settings)


def _with_begin_token(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """Return a tokenizer that also puts `token` before each text.

    Raises UserError if there is no such token, or if the tokenizer adds another begin token.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    begin_id = backend.token_to_id(token)
    if tokenizer.bos_ids == (begin_id,):  # as in the copy that a run saves
        return tokenizer
    if begin_id is None or tokenizer.bos_ids:
        own = [backend.id_to_token(i) for i in tokenizer.bos_ids]
        raise UserError(
            f"begin_token = {token!r}; expected a token of a tokenizer that adds no begin token "
            f"itself, but this one {f'adds {own}' if own else 'has no such token'}; set "
            "begin_token to None, or to a token of the tokenizer"
        )
    pieces = [token, "$A", *(backend.id_to_token(i) for i in tokenizer.eos_ids)]
    ids = {piece: backend.token_to_id(piece) for piece in pieces if piece != "$A"}
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=pieces, special_tokens=list(ids.items())
    )
    return replace(tokenizer, backend=backend)


def build_tokenizer(config: Mapping[str, Any]) -> Tokenizer:
    """Build a tokenizer from `{"path": …, "length": 64}` or `{"package": …, "length": 64}`.

    With `package`, the name of an installed pip package, the tokenizer is the only file of that
    package that matches the glob `path` (by default "*tokenizer.json"). Other keys are the settings
    of `load_tokenizer`. `begin_token` is put before every text, for a decoder whose tokenizer adds
    no begin token; T5's decoders begin with "<pad>".
    """
    settings = dict(config)
    package, path = settings.pop("package", None), settings.pop("path", None)
    begin_token = settings.pop("begin_token", None)
    known = ("length", "pad_id", "cleaning")
    if unknown := set(settings) - set(known):
        raise UserError(
            f"the tokenizer has no settings {sorted(unknown)}; it has path, package, begin_token, "
            f"{', '.join(known)}"
        )
    if package is not None:
        path = package_file(package, path or "*tokenizer.json")
    elif not path:
        raise UserError(
            "the tokenizer has no path; set it to a local folder that contains tokenizer.json"
        )
    tokenizer = load_tokenizer(path, **settings)
    return tokenizer if begin_token is None else _with_begin_token(tokenizer, begin_token)


def _load_backend(path: Path) -> tuple[tokenizers.Tokenizer, Path]:
    """Return the tokenizer at a path, and the folder that contains its settings."""
    if path.is_file():
        return tokenizers.Tokenizer.from_file(str(path)), path.parent
    if (path / "tokenizer.json").is_file():
        return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")), path
    if path.is_dir():
        return _load_with_transformers(path), path
    raise UserError(
        f"no tokenizer at {str(path)!r}; expected a local folder with tokenizer.json (or a "
        "spiece.model that transformers can read), or CLIP's bpe_simple_vocab_16e6.txt.gz"
    )


def _load_with_transformers(folder: Path) -> tokenizers.Tokenizer:
    import transformers  # takes seconds, and most tokenizers do not need it

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        listed = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "no file"
        raise UserError(
            f"no tokenizer in {folder}, which contains {listed}; expected tokenizer.json, or files "
            f"that transformers reads (its error: {' '.join(str(error).split())})"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{folder}: {type(loaded).__name__} has no fast version in transformers; convert "
            "it to tokenizer.json"
        )
    if loaded.pad_token is not None:
        backend.enable_padding(pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
    return backend


def _find_pad_id(backend: tokenizers.Tokenizer, folder: Path) -> int:
    if backend.padding is not None:
        return int(backend.padding["pad_id"])
    names: list[str] = [*PAD_NAMES]
    config = folder / "tokenizer_config.json"
    if config.is_file():
        pad = json.loads(config.read_text()).get("pad_token")
        names.insert(0, pad["content"] if isinstance(pad, dict) else pad or "")
    for name in names:
        pad_id = backend.token_to_id(name)
        if pad_id is not None:
            return pad_id
    raise UserError(f"the tokenizer in {folder} names no padding token; set pad_id to its id")
