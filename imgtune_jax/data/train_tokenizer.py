"""Training of a byte-level BPE or WordPiece tokenizer on texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from imgtune_jax.data.tokenizer import CLEANINGS, Tokenizer, save_tokenizer_files

# GPT-2's words, plus combining marks: without them, no Hindi word would be one token.
WORD_PATTERN = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]


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
    """Train a tokenizer on texts, save it to `folder` and return it. Deterministic.

    `kind` is "bpe" (byte-level, so that every text can be encoded) or "wordpiece". Ids 0 to 3 are
    <pad>, <bos>, <eos> and <unk>; every text is encoded between <bos> and <eos>. Each of `prompts`
    (such as "<de>") is one special token, which `decode` skips. `length` is the length of the
    returned tokenizer; it is not saved, since no weights depend on it yet and each config sets it.
    """
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"kind = {kind!r}; known: {', '.join(TOKENIZER_KINDS)}")
    corpus = sorted(CLEANINGS[cleaning](t) for t in texts)
    backend = TOKENIZER_KINDS[kind](corpus, vocab_size - len(prompts))
    backend.add_special_tokens(list(prompts))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    save_tokenizer_files(backend, {"pad_id": 0, "cleaning": cleaning}, Path(folder))
    return Tokenizer(backend, length=length, pad_id=0, cleaning=cleaning)


def _train_bpe(corpus: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
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


def _train_wordpiece(corpus: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    # The trainer numbers continuation letters in the order of a hash table, which differs between
    # runs. As special tokens they have a fixed order; afterwards they become normal tokens again.
    letters = [f"##{letter}" for letter in sorted(set("".join(corpus))) if not letter.isspace()]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS + letters, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIALS]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


# Not unigram: the library's trainer is not deterministic.
TOKENIZER_KINDS = {"bpe": _train_bpe, "wordpiece": _train_wordpiece}
