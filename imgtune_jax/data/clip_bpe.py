"""CLIP's tokenizer, built from its published vocabulary (`bpe_simple_vocab_16e6.txt.gz`)."""

from __future__ import annotations

import gzip
import html
from pathlib import Path

import ftfy
from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing

from imgtune_jax.errors import UserError

LENGTH = 77
NUM_MERGES = 49152 - 256 - 2  # the expression in CLIP's code
START, END = "<start_of_text>", "<end_of_text>"
WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clean(text: str) -> str:
    """Clean a text as CLIP does: ftfy, unescape HTML twice, collapse white space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def build_clip_tokenizer(vocabulary: Path) -> Tokenizer:
    """Build CLIP's byte-level BPE tokenizer of 49408 tokens. It adds a start and an end token.

    Raises UserError if `vocabulary` does not have CLIP's number of merges.
    """
    lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    merges = [(a, b) for a, b in (line.split() for line in lines[1 : NUM_MERGES + 1])]
    if len(merges) != NUM_MERGES:
        raise UserError(
            f"{vocabulary} has {len(merges)} merges; expected {NUM_MERGES}, as in CLIP's vocabulary"
        )
    characters = _byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges)]
    tokens += [START, END]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab, merges, end_of_word_suffix="</w>", fuse_unk=False))
    backend.pre_tokenizer = Sequence(
        [
            Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (START, END)]
    )
    backend.post_processor = TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, vocab[START]), (END, vocab[END])]
    )
    return backend


def _byte_characters() -> list[str]:
    """Return the characters that encode the 256 bytes, in the order of CLIP's vocabulary.

    A printable byte encodes itself. The other bytes come last, as the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    unprintable = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(unprintable))]
