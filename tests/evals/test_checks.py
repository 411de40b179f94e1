from __future__ import annotations

import numpy as np
import pytest

from imgtune_jax.evals.checks import checked_labels
from imgtune_jax.evals.fewshot import FewShot
from imgtune_jax.evals.linear_probe import LinearProbe
from imgtune_jax.evals.scoring_classifier import ScoringClassifier
from imgtune_jax.evals.zeroshot import ZeroShot


class Named(list):
    """A source of no records whose classes have names."""

    def __init__(self, *class_names):
        super().__init__()
        self.class_names = class_names


OWN = Named("cat", "Golden_Retriever", "dog")
EVALUATORS = {
    "zeroshot": lambda names: ZeroShot(OWN, names),
    "scoring_classifier": lambda names: ScoringClassifier(OWN, names),
    "linear_probe": lambda names: LinearProbe(OWN, Named(*names), 3),
    "linear_probe_val": lambda names: LinearProbe(OWN, [], 3, val_source=Named(*names)),
    "fewshot": lambda names: FewShot(OWN, Named(*names), 3),
}


@pytest.mark.parametrize("build", EVALUATORS.values(), ids=EVALUATORS)
@pytest.mark.parametrize(
    "names",
    [
        ("cat", "dog", "golden retriever"),
        ("GOLDEN-RETRIEVER", "cat", "dog"),
        ("cat", "dog"),  # a class is missing, so the labels of the next ones are shifted
        ("bird", "cat", "golden retriever", "dog"),
    ],
)
def test_classes_in_another_order_than_the_sources_are_refused(build, names):
    with pytest.raises(
        ValueError, match=r"in the source it has label .* cat, Golden_Retriever, dog"
    ):
        build(names)


@pytest.mark.parametrize("build", EVALUATORS.values(), ids=EVALUATORS)
@pytest.mark.parametrize(
    "names",
    [
        ("cat", "golden retriever", "dog"),
        ("n02123045", "n02099601", "n02084071"),
        ("house cat", "golden retriever", "puppy", "bird"),
    ],
)
def test_classes_in_the_same_order_or_with_other_names_are_accepted(build, names):
    build(names)


def test_class_name_that_occurs_twice_is_accepted_at_either_label():
    ZeroShot(Named("crane", "stork", "crane machine"), ("crane", "stork", "crane"))


@pytest.mark.parametrize("labels", [(-1, 0), (None, 0), (0, 2)])
def test_label_that_is_not_a_class_raises(fakes, labels):
    source = [fakes.record(np.ones(2), label=label) for label in labels]
    bad = next(x for x in labels if x != 0)
    with pytest.raises(ValueError, match=f"1 of 2 .* such as {bad}; expected labels from 0 to 1"):
        checked_labels(source, np.ones(2, bool), num_classes=2)


def test_source_without_a_readable_record_raises(fakes):
    source = [fakes.record(None, label=0)] * 3
    with pytest.raises(ValueError, match="none of the 3 records could be read"):
        checked_labels(source, np.zeros(3, bool), num_classes=2)
