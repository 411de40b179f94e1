"""What needs Java: the Penn Treebank tokenizer and METEOR, as pycocoevalcap runs them.

Published COCO numbers are made with this tokenizer. Optional: `pip install imgtune-jax[java]`.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence

from imgtune_jax.evals.caption_metrics.tokens import Tokens


def ptb_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Stanford's PTB tokens (CoreNLP 3.4.1), lower case, without pycocoevalcap's punctuation.

    Raises ValueError, saying what to install, where pycocoevalcap or Java is missing.
    """
    require_java()
    from pycocoevalcap.tokenizer.ptbtokenizer import (  # pyright: ignore[reportMissingImports]
        PTBTokenizer,
    )

    # A line that is empty at the end of the text is lost: the text ends with a word.
    lines = dict(enumerate([*texts, "end"]))
    found = PTBTokenizer().tokenize({i: [{"caption": t}] for i, t in lines.items()})
    return [found[i][0].split() for i in range(len(texts))]


def meteor(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> dict[str, float]:
    """`METEOR` 1.5 in [0, 1], English only (W14-3348): stems, synonyms and paraphrases match too.

    Raises ValueError, saying what to install, where pycocoevalcap or Java is missing.
    """
    require_java()
    from pycocoevalcap.meteor.meteor import Meteor  # pyright: ignore[reportMissingImports]

    wanted = {i: [" ".join(r) for r in own] for i, own in enumerate(references)}
    said = {i: [" ".join(p)] for i, p in enumerate(predictions)}
    return {"METEOR": float(Meteor().compute_score(wanted, said)[0])}


def require_java() -> None:
    """Raise ValueError, saying what to install, where pycocoevalcap or Java is missing."""
    missing = ["Java (a `java` on the path)"] if shutil.which("java") is None else []
    if importlib.util.find_spec("pycocoevalcap") is None:
        missing.append("pycocoevalcap (pip install 'imgtune-jax[java]')")
    if missing:
        raise ValueError(
            f"the PTB tokenizer and METEOR need {' and '.join(missing)}; install what is missing, "
            'or use tokenization="simple" and leave "meteor" out of the metrics'
        )
