"""Learn the captioners' tokenizer from the training captions: names of the seen concepts alone.

python -m corpora.emoji.tokenizer [--out corpora/emoji/tokenizer]

Byte-level, so that it can write any name of any language; one token for each language's prompt.
"""

import argparse
from pathlib import Path

from configs import emoji
from imgtune_jax import data

VOCAB_SIZE = 6000
FOLDER = Path(__file__).with_name("tokenizer")


def names() -> list[str]:
    """Every seen concept's name in every language."""
    source = data.build_source(emoji.captions_source("seen", "google"))
    records = (data.read_metadata(source, i) for i in range(len(source)))
    return [text for r in records for texts in r.captions.values() for text in texts]


def build(folder: Path) -> data.Tokenizer:
    """Write it to a folder; the same bytes every time."""
    fields = dict(vocab_size=VOCAB_SIZE, cleaning="none")
    return data.train_tokenizer(names(), folder, prompts=emoji.PREFIXES.values(), **fields)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    build(parser.parse_args().out)
