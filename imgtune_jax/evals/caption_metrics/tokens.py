"""Tokenization of captions, for the metrics that count words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import regex

Tokens = Sequence[str]

# Scripts written without spaces between words: every letter is a token.
SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
SIGNS = "&%#@*"  # punctuation in Unicode, but tokens in a caption ("keycap: #")
WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{SPACELESS}]]+"
CLITIC = r"(?:n't|'(?:s|ll|re|ve|d|m))(?!\p{L})"
TOKEN = regex.compile(
    rf"""
    (?:\p{{L}}\.){{2,}}                                             # p.m.
    | [[{SPACELESS}]&&\p{{L}}]\p{{M}}*                              # 狐
    | {CLITIC}                                                      # 's
    | {WORD} (?: (?: [-'] | (?<=\p{{N}})[.,:/](?=\p{{N}}) ) {WORD})*  # t-shirt, 3.50
    | [\p{{S}}{SIGNS}]                                              # ✨
    """,
    regex.VERBOSE | regex.VERSION1,
)
BEFORE_CLITIC = regex.compile(rf"(?<=\p{{L}})(?={CLITIC})")
PUNCTUATION = regex.compile(rf"[\p{{P}}--[{SIGNS}]]+", regex.VERSION1)


def simple_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Split texts of any language into lower-case words; similar to `ptb`, but without Java.

    Punctuation is dropped. In scripts written without spaces (Han, kana, Thai, Lao, Khmer,
    Burmese, Tibetan), every letter is a token. Words keep inner hyphens and apostrophes, and
    numbers keep inner `.`, `,`, `:` and `/`. English 's, n't, 'll, 're, 've, 'd and 'm are separate
    tokens, and so are signs (& % # @ * $ + and emoji). On plain English, the tokens are those of
    the tokenization `ptb`, except that brackets are dropped (`-lrb-` in `ptb`), "cannot" is one
    token, and titles and addresses are split at periods ("Mr." is "mr").
    """
    return [TOKEN.findall(BEFORE_CLITIC.sub(" ", _lower(text))) for text in texts]


def normalize_text(text: str) -> str:
    """Apply Unicode NFKC and lower case; replace punctuation and white space by single spaces.

    The signs & % # @ * are not replaced.
    """
    return " ".join(PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).lower()).split())


def ngrams(tokens: Tokens, n: int) -> Iterator[tuple[str, ...]]:
    """Yield all sequences of n consecutive tokens, in order."""
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def _lower(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower().replace("’", "'")
