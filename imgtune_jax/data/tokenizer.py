"""Text -> fixed-length token ids and their mask, with a tokenizer that travels with the weights.

Wrong text preprocessing is silent and costs points: SigLIP wants canonicalised text, CLIP its own
cleaning, both an end token that truncation must not cut off. So cleaning, length and padding are
fields, saved beside the tokenizer, and a saved one is not loaded under other settings.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Bool, Int32

from imgtune_jax.data import clip_bpe
from imgtune_jax.package_files import package_file

SETTINGS_FILE = "imgtune_tokenizer.json"
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")


def lower(text: str) -> str:
    """Lower case, white space collapsed."""
    return " ".join(text.split()).lower()


def canonicalize(text: str) -> str:
    """SigLIP's: lower case, "_" to space, no ASCII punctuation, white space collapsed."""
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
    """`tokenizer(texts)` -> (ids i32[b l], mask bool[b l]), every row exactly `length` long.

    The mask is True on a text's own tokens, its begin and end tokens included. A longer text loses
    its last words, never its end token. `backend` adds the begin and end tokens.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    length: int
    pad_id: int
    cleaning: str = "none"

    def __post_init__(self) -> None:
        if self.cleaning not in CLEANINGS:
            raise ValueError(f"cleaning = {self.cleaning!r}; known: {', '.join(CLEANINGS)}")
        added = self.backend.num_special_tokens_to_add(False)
        if self.length <= added:
            raise ValueError(
                f"length = {self.length} leaves no room beside {added} begin and end tokens"
            )
        self.backend.no_padding()
        self.backend.enable_truncation(self.length)

    def __call__(
        self, texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, "b l"], Bool[np.ndarray, "b l"]]:
        """Token ids, padded with `pad_id`, and which of them are real."""
        if isinstance(texts, str):
            raise ValueError(f"got one string, {texts[:40]!r}; wanted a list of texts")
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
        """(ids, mask, target mask) of begin, prefix, text, end.

        The target mask is True on a text and its end: what a captioner is to write. A prefix is
        tokenized apart from its text, so that it is the same tokens before every text.
        """
        plain, mask = self(texts)
        targets = mask.copy()
        begin, end = len(self.bos_ids), len(self.eos_ids)
        targets[:, :begin] = False
        for i, prefix in enumerate(prefixes):
            if not prefix:
                continue
            inner = self.prompt_ids(prefix)[begin:]
            row = plain[i][mask[i]].tolist()
            body = row[begin : len(row) - end][: self.length - begin - end - len(inner)]
            row = [*self.bos_ids, *inner, *body, *self.eos_ids]
            plain[i] = row + [self.pad_id] * (self.length - len(row))
            mask[i] = np.arange(self.length) < len(row)
            targets[i] = mask[i] & (np.arange(self.length) >= begin + len(inner))
        return plain, mask, targets

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """Texts of token ids, without begin, end and padding; white space collapsed."""
        texts = self.backend.decode_batch([list(row) for row in rows])
        return [" ".join(text.split()) for text in texts]

    def prompt_ids(self, prefix: str = "") -> list[int]:
        """What generation starts from: the begin tokens and the prefix.

        Raises ValueError for a prefix that leaves no room for a text.
        """
        inner = self.backend.encode(CLEANINGS[self.cleaning](prefix), add_special_tokens=False).ids
        if len(self.bos_ids) + len(inner) + len(self.eos_ids) >= self.length:
            raise ValueError(f"the prefix {prefix!r} fills all {self.length} tokens of a text")
        return [*self.bos_ids, *inner]

    @cached_property
    def bos_ids(self) -> tuple[int, ...]:
        """The tokens in front of every text."""
        return self._bos_eos[0]

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens behind every text."""
        return self._bos_eos[1]

    @cached_property
    def _bos_eos(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        bare = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a").ids
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        if not bare or not starts:
            raise ValueError("this tokenizer changes a text when it adds its begin and end tokens")
        return tuple(whole[: starts[0]]), tuple(whole[starts[0] + len(bare) :])

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @property
    def settings(self) -> dict[str, Any]:
        """What must match besides the vocabulary, ready for JSON."""
        return {"length": self.length, "pad_id": self.pad_id, "cleaning": self.cleaning}

    @property
    def fingerprint(self) -> str:
        """Digest of all that determines the ids."""
        whole = json.dumps([self.backend.to_str(), self.settings], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:24]

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` and the settings; `load_tokenizer(folder)` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _save(self.backend, self.settings, folder)
        return folder


def _save(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], folder: Path) -> None:
    backend.save(str(folder / "tokenizer.json"))
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=1) + "\n")


def load_tokenizer(path: str | Path, **settings: Any) -> Tokenizer:
    """From a local folder or file; nothing is downloaded.

    Path: a folder with `tokenizer.json`, one that `transformers` can read (`spiece.model`, …), a
    `tokenizer.json` itself, or CLIP's `bpe_simple_vocab_16e6.txt.gz` (then cleaning is "clip",
    padding is 0 and the length 77 unless set). Settings: `length`, `pad_id`, `cleaning`; where
    the folder was saved with settings, these hold.
    Raises ValueError when nothing is there, or when the saved settings are others.
    """
    path = Path(path)
    settings = {k: v for k, v in settings.items() if v is not None}
    if path.name.endswith(".txt.gz") and path.is_file():
        defaults = {"length": clip_bpe.LENGTH, "pad_id": 0, "cleaning": "clip"}
        return Tokenizer(clip_bpe.build_clip_tokenizer(path), **(defaults | settings))
    if path.is_file():
        backend, folder = tokenizers.Tokenizer.from_file(str(path)), path.parent
    elif (path / "tokenizer.json").is_file():
        backend, folder = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")), path
    elif path.is_dir():
        backend, folder = _from_transformers(path), path
    else:
        raise ValueError(
            f"no tokenizer at {str(path)!r}; wanted a local folder with tokenizer.json (or a "
            "spiece.model that transformers can read), or CLIP's bpe_simple_vocab_16e6.txt.gz"
        )
    saved = (
        json.loads((folder / SETTINGS_FILE).read_text())
        if (folder / SETTINGS_FILE).is_file()
        else {}
    )
    changed = {k: (saved[k], v) for k, v in settings.items() if k in saved and saved[k] != v}
    if changed:
        raise ValueError(
            f"the tokenizer in {folder} was saved with other settings (saved, asked): {changed}; "
            "weights trained with it expect the saved ones"
        )
    merged = saved | settings
    if "length" not in merged:
        raise ValueError(f"the length of texts is not set for the tokenizer {path}: length=64, say")
    if "pad_id" not in merged:
        merged["pad_id"] = _find_pad_id(backend, folder)
    return Tokenizer(backend, **merged)


def build_tokenizer(config: Mapping[str, Any]) -> Tokenizer:
    """From `{"path": …, "length": 64}` or `{"package": "pip-name", "length": 64}`.

    With `package`, the tokenizer is in an installed pip package: its one file that fits the glob
    `path` ("*tokenizer.json" unless given). Other keys are `load_tokenizer`'s settings.
    """
    config = dict(config)
    package, path = config.pop("package", None), config.pop("path", None)
    known = ("length", "pad_id", "cleaning")
    if wrong := set(config) - set(known):
        raise ValueError(
            f"tokenizer has no {sorted(wrong)}; it has path, package, {', '.join(known)}"
        )
    if package is not None:
        return load_tokenizer(package_file(package, path or "*tokenizer.json"), **config)
    if not path:
        raise ValueError("the tokenizer has no path; give a local folder that holds tokenizer.json")
    return load_tokenizer(path, **config)


def _from_transformers(folder: Path) -> tokenizers.Tokenizer:
    import transformers  # seconds to import, and most tokenizers do not need it

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        listed = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"no tokenizer in {folder}: wanted tokenizer.json, or files that transformers reads "
            f"(it said: {' '.join(str(error).split())}); there is {listed}"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{folder}: {type(loaded).__name__} has no fast version; convert it to a tokenizer.json"
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
        found = backend.token_to_id(name)
        if found is not None:
            return found
    raise ValueError(f"{folder} does not say which token pads; set pad_id")


def train_tokenizer(
    texts: Iterable[str],
    folder: str | Path,
    *,
    vocab_size: int,
    kind: str = "bpe",
    length: int = 64,
    cleaning: str = "lower",
    prompts: Sequence[str] = (),
) -> Tokenizer:
    """Learn a tokenizer from texts and save it. The same texts give the same file.

    kind: "bpe" (byte-level, so no text is unknown) or "wordpiece". Ids 0 to 3 are <pad>, <bos>,
    <eos>, <unk>; every text is wrapped in <bos> and <eos>. Each of `prompts` ("<de>") is one token,
    and none of what decoding shows. `length` is that of the tokenizer returned; it is not saved, as
    no weights depend on it yet: each config says its own.
    """
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"kind = {kind!r}; known: {', '.join(TOKENIZER_KINDS)}")
    corpus = sorted(CLEANINGS[cleaning](t) for t in texts)
    backend = TOKENIZER_KINDS[kind](corpus, vocab_size - len(prompts))
    backend.add_special_tokens(list(prompts))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _save(backend, {"pad_id": 0, "cleaning": cleaning}, folder)
    return Tokenizer(backend, length=length, pad_id=0, cleaning=cleaning)


# GPT-2's words, with marks: without them no Hindi word would be one token.
WORD_PATTERN = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]


def _bpe(corpus: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.Prepend(" ")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORD_PATTERN), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def _wordpiece(corpus: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    # The trainer numbers continuing letters in the order of a hash table, which differs between
    # runs; given as special tokens they have an order, and afterwards they are special no more.
    letters = [f"##{letter}" for letter in sorted(set("".join(corpus))) if not letter.isspace()]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS + letters, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIALS]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


# No unigram: the library's trainer gives another file at every run.
TOKENIZER_KINDS = {"bpe": _bpe, "wordpiece": _wordpiece}
