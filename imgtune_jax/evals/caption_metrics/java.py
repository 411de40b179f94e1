"""The Penn Treebank (PTB) tokenizer and METEOR; pycocoevalcap runs both in Java.

Published COCO scores use this tokenizer. Both need the extra `pip install imgtune-jax[java]`.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence

from imgtune_jax.errors import UserError
from imgtune_jax.evals.caption_metrics.tokens import Tokens

# The tokenizer drops empty lines at the end of its input, so this line follows the texts. If it is
# returned in the same place, each text was one line.
LAST_LINE = "endofcaptions"


def ptb_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Tokenize with Stanford's PTB tokenizer (CoreNLP 3.4.1).

    Tokens are in lower case. The tokens on pycocoevalcap's list of punctuation are removed.
    Raises UserError that names what to install if pycocoevalcap or Java is missing.
    """
    require_java()
    from pycocoevalcap.tokenizer.ptbtokenizer import (  # pyright: ignore[reportMissingImports]
        PTBTokenizer,
    )

    lines = dict(enumerate([*map(_one_line, texts), LAST_LINE]))
    tokens = PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in lines.items()})
    if tokens.get(len(texts)) != [LAST_LINE]:
        raise UserError(
            f"the PTB tokenizer did not return one line for each of the {len(texts)} texts; use "
            'tokenization="simple"'
        )
    return [tokens[i][0].split() for i in range(len(texts))]


def _one_line(text: str) -> str:
    """Replace all characters that end a line, such as U+2028, by spaces; replace surrogates."""
    return " ".join(text.splitlines()).encode("utf-8", "replace").decode()


def meteor(
    predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> dict[str, float]:
    """Return `METEOR` 1.5 in [0, 1], which also matches stems, synonyms and paraphrases (W14-3348).

    English only. Raises UserError that names what to install if pycocoevalcap or Java is missing.
    """
    require_java()
    from pycocoevalcap.meteor.meteor import Meteor  # pyright: ignore[reportMissingImports]

    joined_references = {
        i: [" ".join(tokens) for tokens in row] for i, row in enumerate(references)
    }
    candidates = {i: [" ".join(tokens)] for i, tokens in enumerate(predictions)}
    return {"METEOR": float(Meteor().compute_score(joined_references, candidates)[0])}


def require_java() -> None:
    """Raise UserError that names what to install if pycocoevalcap or Java is missing."""
    missing = ["Java (a `java` on the path)"] if shutil.which("java") is None else []
    if importlib.util.find_spec("pycocoevalcap") is None:
        missing.append("pycocoevalcap (pip install 'imgtune-jax[java]')")
    if missing:
        raise UserError(
            f"the PTB tokenizer and METEOR need {' and '.join(missing)}; install it, "
            'or use tokenization="simple" and remove "meteor" from the metrics'
        )
