"""Train the captioners' tokenizer on the training captions: the names of the concepts of seen.tar.

python -m corpora.emoji.tokenizer [--out corpora/emoji/tokenizer]

It is byte-level, so that it can encode any name in any language. The prompt of each language, such
as "<de>", is one token.
"""

import argparse
from pathlib import Path

from configs import emoji
from imgtune_jax import data

VOCAB_SIZE = 6000
FOLDER = Path(__file__).with_name("tokenizer")


def seen_names() -> list[str]:
    """Return the names, in all languages, of all concepts of seen.tar."""
    source = data.build_source(emoji.captions_source("seen", "google"))
    records = (data.read_metadata(source, i) for i in range(len(source)))
    return [text for r in records for texts in r.captions.values() for text in texts]


def build_emoji_tokenizer(folder: Path) -> data.Tokenizer:
    """Train the tokenizer and save it to a folder. The result is deterministic."""
    return data.train_tokenizer(
        seen_names(),
        folder,
        vocab_size=VOCAB_SIZE,
        cleaning="none",
        prompts=tuple(emoji.PREFIXES.values()),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    build_emoji_tokenizer(parser.parse_args().out)
