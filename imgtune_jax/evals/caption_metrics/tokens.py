"""Captions into tokens, for the scores that count words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import regex

Tokens = Sequence[str]

# Scripts written without spaces between words: a letter is a token by itself.
SPACELESS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
SIGNS = "&%#@*"  # punctuation to Unicode, words to a caption ("keycap: #")
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
    """Lower case; words as Penn Treebank has them, punctuation dropped; no Java, any language.

    A letter of a script that is written without spaces (Han, kana, Thai, Lao, Khmer, Burmese,
    Tibetan) is a token by itself. Words keep inner hyphens and apostrophes, numbers their points;
    English 's, n't, 'll, 're, 've, 'd and 'm are tokens of their own; so is a sign (& % # @ * $ +
    or an emoji). On plain English this is what `ptb` gives, except that it also drops brackets
    (there `-lrb-`), keeps "cannot" and cuts at the points of titles and addresses ("Mr.").
    """
    return [TOKEN.findall(BEFORE_CLITIC.sub(" ", _lower(text))) for text in texts]


def normalised(text: str) -> str:
    """NFKC, lower case, punctuation to space (but not & % # @ *), white space collapsed."""
    return " ".join(PUNCTUATION.sub(" ", unicodedata.normalize("NFKC", text).lower()).split())


def ngrams(tokens: Tokens, n: int) -> Iterator[tuple[str, ...]]:
    """All runs of n tokens, in order."""
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def _lower(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower().replace("’", "'")
