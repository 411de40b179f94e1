"""Training of a byte-level BPE or WordPiece tokenizer on texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from imgtune_jax.data.tokenizer import CLEANINGS, Tokenizer, save_tokenizer_files
from imgtune_jax.errors import UserError
from imgtune_jax.paths import user_path

# GPT-2's pattern, with combining marks (\p{M}): without these, vowel signs would split Hindi words.
WORD_PATTERN = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+"
SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]


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
    """Train a tokenizer on texts, save it to `folder` and return it. The result is deterministic.

    `kind` is "bpe" (byte-level, so that every text can be encoded) or "wordpiece". Ids 0 to 3 are
    <pad>, <bos>, <eos> and <unk>; every text is encoded between <bos> and <eos>. Each of `prompts`
    (such as "<de>") is one special token, which `decode` skips. `length` is that of the returned
    tokenizer. It is not saved: no weights depend on it yet, and each config sets it.
    """
    if kind not in TOKENIZER_KINDS:
        raise UserError(f"kind = {kind!r}; known: {', '.join(TOKENIZER_KINDS)}")
    corpus = sorted(CLEANINGS[cleaning](t) for t in texts)
    backend = TOKENIZER_KINDS[kind](corpus, vocab_size - len(prompts))
    backend.add_special_tokens(list(prompts))
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    save_tokenizer_files(backend, {"pad_id": 0, "cleaning": cleaning}, user_path(folder))
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
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def _train_wordpiece(corpus: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    # The trainer numbers letters inside words ("##a") in the order of a hash table, which differs
    # between runs. It keeps the order of special tokens, so these letters are special in training,
    # and normal tokens afterwards.
    letters = [f"##{letter}" for letter in sorted(set("".join(corpus))) if not letter.isspace()]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS + letters, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL_TOKENS]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


# The unigram trainer of the library is left out, since it is not deterministic.
TOKENIZER_KINDS = {"bpe": _train_bpe, "wordpiece": _train_wordpiece}
