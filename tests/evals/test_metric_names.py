"""Before it runs, an evaluator declares its metrics, and checks its settings and its sources."""

import io
import re
import types

import numpy as np
import pytest
from PIL import Image

from imgtune_jax import data, evals, objectives
from imgtune_jax.evals import caption_metrics
from imgtune_jax.evals.captioning import Captioning
from imgtune_jax.evals.fewshot import FewShot
from imgtune_jax.evals.linear_probe import LinearProbe
from imgtune_jax.evals.retrieval import Retrieval
from imgtune_jax.evals.ridge_retrieval import RidgeRetrieval
from imgtune_jax.evals.scoring_classifier import ScoringClassifier
from imgtune_jax.evals.validation_loss import ValidationLoss
from imgtune_jax.evals.zeroshot import ZeroShot
from tests.evals.conftest import FakePredictor, FakeSource, record

RNG = np.random.default_rng(0)
CLASSES = ("red", "green", "blue", "black", "white")
LABELED = FakeSource(record(RNG.normal(size=8), f"text {i}", label=i % 5) for i in range(20))
CAPTIONED = FakeSource(record("a dog runs", "a dog runs", group=i) for i in range(3))
TEXTS = {f"text {i}": RNG.normal(size=8) for i in range(20)} | {
    name: RNG.normal(size=8) for name in CLASSES
}
TERMS = {"softmax": {}, "sigmoid": {}, "captioning": {}}


class CoCa(FakePredictor):
    """A predictor with embeddings and a decoder, for sources whose images are strings."""

    def embed_images(self, source):
        return np.eye(4, dtype=np.float32)[: len(source)], np.ones(len(source), bool)

    def embed_texts(self, texts, prefix=""):
        return np.eye(4, dtype=np.float32)[: len(texts)]


EVALUATORS = {
    "retrieval": (Retrieval(LABELED), FakePredictor(TEXTS)),
    "zeroshot": (ZeroShot(LABELED, CLASSES, "name", per_class=True), FakePredictor(TEXTS)),
    "linear_probe": (LinearProbe(LABELED, LABELED, 5, l2s=(1.0,)), FakePredictor()),
    "fewshot": (FewShot(LABELED, LABELED, 5, shots=(1, 2)), FakePredictor()),
    "loss": (ValidationLoss(CAPTIONED, objectives.build_objective(TERMS)), CoCa()),
    "ridge_retrieval": (RidgeRetrieval(LABELED, LABELED), FakePredictor(TEXTS)),
    "captioning": (Captioning(CAPTIONED), FakePredictor()),
    "scoring_classifier": (ScoringClassifier(LABELED, CLASSES), FakePredictor(TEXTS)),
}


@pytest.mark.parametrize("name", evals.EVALUATORS)
def test_declared_metrics_are_those_that_the_evaluator_reports(name):
    evaluator, predictor = EVALUATORS[name]
    assert sorted(evaluator.metric_names()) == sorted(evaluator(predictor))


def test_recalls_beyond_the_number_of_images_are_not_declared():
    few = FakeSource(LABELED[:4])
    evaluator = Retrieval(few, ks=(1, 10))
    assert "image_retrieval_recall@10" not in evaluator.metric_names()
    assert "image_retrieval_recall@10" not in evaluator(FakePredictor(TEXTS))


def test_names_of_caption_metrics_need_no_java():
    names = caption_metrics.metric_names(("meteor", "cider"))
    assert set(names) == {"METEOR", "CIDEr"}


def png():
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "PNG")
    return out.getvalue()


def source(n=3, **fields):
    """Return a source of n records with an image, a caption, a label and a group."""
    values = dict(image=png(), captions={"caption": ("x",)}, label=1, group=1) | fields
    return FakeSource(data.Record(key=f"record {i}", **values) for i in range(n))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return data.train_tokenizer(["a red fox"] * 9, folder, vocab_size=270, length=6)


def model(**components):
    """Return a model that has the given components."""
    parts = dict(text=None, decoder=None, logit_bias_init=None) | components
    return types.SimpleNamespace(**parts)


CONTRASTIVE = model(text="a tower")
DECODER = types.SimpleNamespace(max_length=6)
CAPTIONER = model(decoder=DECODER)
SOFTMAX = objectives.build_objective({"softmax": {"positives": "group"}})
TWO = ("no", "yes")
UNLABELED, UNREADABLE, SILENT = source(label=None), source(image=b"?"), source(captions={})
INVALID = [
    (Retrieval(source()), CAPTIONER, "needs a text tower"),
    (Retrieval(SILENT), CONTRASTIVE, "none of the 3 records has a caption in the set 'caption'"),
    (Retrieval(UNREADABLE), CONTRASTIVE, "none of 3 images of the source can be read"),
    (RidgeRetrieval(SILENT, source()), CONTRASTIVE, "has a caption in the set"),
    (RidgeRetrieval(source(), SILENT), CONTRASTIVE, "has a caption in the set"),
    (ZeroShot(source(), TWO), CAPTIONER, "needs a text tower"),
    (ZeroShot(UNLABELED, TWO), CONTRASTIVE, "record 0 has the label None; expected labels from 0"),
    (ZeroShot(source(label=2), TWO), CONTRASTIVE, "has the label 2; expected labels from 0 to 1"),
    (ZeroShot(source(), TWO, ("a photo",)), CONTRASTIVE, "class name"),
    (ZeroShot(source(), TWO, {"no": ("no",)}), CONTRASTIVE, "class 'yes' has no prompts"),
    (ScoringClassifier(source(), TWO), CONTRASTIVE, "needs a decoder"),
    (ScoringClassifier(source(), TWO, prefix="a a a a a"), CAPTIONER, "fills all 6 tokens"),
    (LinearProbe(source(), UNLABELED, 2), CONTRASTIVE, "has the label None"),
    (LinearProbe(source(), source(), 2, UNLABELED), CONTRASTIVE, "has the label None"),
    (FewShot(source(label=5), source(), 2), CONTRASTIVE, "has the label 5"),
    (Captioning(source()), CONTRASTIVE, "no decoder"),
    (Captioning(source(), decoding={"max_new_tokens": 6}), CAPTIONER, "at most 5"),
    (Captioning(source(), prefix="a a a a a"), CAPTIONER, "fills all 6 tokens"),
    (Captioning(SILENT), CAPTIONER, "has a caption in the set"),
    (ValidationLoss(source(), SOFTMAX), CAPTIONER, "the model returned no image_emb"),
    (ValidationLoss(source(), SOFTMAX), model(text="", logit_bias_init=-1.0), "logit_bias"),
    (ValidationLoss(SILENT, SOFTMAX), CONTRASTIVE, "has a caption in the set"),
]


@pytest.mark.parametrize(("evaluator", "model", "message"), INVALID)
def test_evaluator_that_does_not_fit_its_source_or_the_model_is_an_error_before_training(
    evaluator, model, message, tokenizer
):
    with pytest.raises(ValueError, match=message):
        evaluator.check(model, tokenizer)


def test_evaluators_that_fit_pass_the_check(tokenizer):
    both = model(text="a tower", decoder=DECODER)
    for evaluator in (
        Retrieval(source()),
        RidgeRetrieval(source(), source()),
        ZeroShot(source(), TWO),
        ScoringClassifier(source(), TWO, prefix="a"),
        LinearProbe(source(), source(), 2),
        FewShot(source(), source(), 2),
        Captioning(source(), decoding={"max_new_tokens": 3}),
        ValidationLoss(source(), SOFTMAX),
    ):
        evaluator.check(both, tokenizer)


def test_record_without_label_is_no_error_if_its_image_is_unreadable():
    """Evaluators exclude unreadable images."""
    mixed = FakeSource([*source(2), *source(1, image=b"?", label=None)])
    LinearProbe(mixed, mixed, 2).check(CONTRASTIVE, None)


def test_errors_of_all_evaluators_are_listed():
    missing = dict(name="folder", path="nowhere")
    with pytest.raises(ValueError) as error:
        evals.build_evaluators({n: dict(name="retrieval", source=missing) for n in "ab"})
    for name in "ab":
        assert re.search(rf"{name}: path = '.*nowhere' is not a folder", str(error.value))
