"""What needs Java: the Penn Treebank tokenizer and METEOR, as pycocoevalcap runs them.

Published COCO numbers are made with this tokenizer. Optional: `pip install imgtune-jax[java]`.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from typing import Any

from imgtune_jax.evals.caption_metrics.tokens import Tokens


def ptb(texts: Sequence[str]) -> list[list[str]]:
    """Stanford's PTB tokens (CoreNLP 3.4.1), lower case, without pycocoevalcap's punctuation.

    Raises ImportError, naming what to install, where pycocoevalcap or Java is missing.
    """
    tokenizer = _load("tokenizer.ptbtokenizer").PTBTokenizer()
    # A line that is empty at the end of the text is lost: the text ends with a word.
    lines = dict(enumerate([*texts, "end"]))
    found = tokenizer.tokenize({i: [{"caption": t}] for i, t in lines.items()})
    return [found[i][0].split() for i in range(len(texts))]


def meteor(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> dict[str, float]:
    """`METEOR` 1.5 in [0, 1], English only (W14-3348): stems, synonyms and paraphrases match too.

    Raises ImportError, naming what to install, where pycocoevalcap or Java is missing.
    """
    scorer = _load("meteor.meteor").Meteor()
    wanted = {i: [" ".join(r) for r in own] for i, own in enumerate(references)}
    said = {i: [" ".join(p)] for i, p in enumerate(predictions)}
    return {"METEOR": float(scorer.compute_score(wanted, said)[0])}


def _load(name: str) -> Any:
    if shutil.which("java") is None:
        raise ImportError(
            "the PTB tokenizer and METEOR need Java, and there is no `java` on the path; install a "
            'Java runtime, or use tokenization="simple" and leave "meteor" out of the metrics'
        )
    try:
        return importlib.import_module(f"pycocoevalcap.{name}")
    except ModuleNotFoundError as error:
        raise ImportError(
            "the PTB tokenizer and METEOR need pycocoevalcap; pip install 'imgtune-jax[java]', or "
            'use tokenization="simple" and leave "meteor" out of the metrics'
        ) from error
