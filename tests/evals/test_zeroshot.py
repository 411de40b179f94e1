from __future__ import annotations

import numpy as np
import pytest

from imgtune_jax.evals import templates, zeroshot
from imgtune_jax.evals.zeroshot import ZeroShot


@pytest.mark.parametrize("case", ["classes_12", "classes_4"])
def test_metrics_equal_clip_benchmark_and_scikit_learn(golden, fakes, case):
    stored = golden("evals_clip_benchmark", case)
    num_classes, prompts, _ = stored["prompt_emb"].shape
    names = tuple(f"c{i}" for i in range(num_classes))
    by_class = {c: [f"{c} {p}" for p in range(prompts)] for c in names}
    texts = {
        f"c{i} {p}": stored["prompt_emb"][i, p] for i in range(num_classes) for p in range(prompts)
    }
    predictor = fakes.Predictor(texts)
    class_emb = zeroshot.class_embeddings(predictor, names, by_class)
    np.testing.assert_allclose(class_emb, stored["class_emb"], rtol=1e-5, atol=1e-7)
    source = [
        fakes.record(x, label=int(y))
        for x, y in zip(stored["image_emb"], stored["labels"], strict=True)
    ]
    got = ZeroShot(source, names, by_class, per_class=True)(predictor)
    for name in ("acc1", "acc5", "mean_per_class_recall", "macro_f1", "macro_precision"):
        assert (name in got) == (name in stored), name
        if name in stored:
            np.testing.assert_allclose(got[name], stored[name], rtol=1e-12, err_msg=name)
    for row, kind in zip(
        stored["per_class"], ("precision", "recall", "f1", "support"), strict=True
    ):
        np.testing.assert_allclose([got[f"per_class/{kind}/{c}"] for c in names], row, rtol=1e-12)


def test_acc5_is_omitted_below_five_classes(golden):
    assert "acc5" in golden("evals_clip_benchmark", "classes_12")
    ranks = np.zeros(3, int)
    labels = np.array([0, 1, 2])
    four = zeroshot.classification_metrics(labels, ranks, labels, num_classes=4)
    assert "acc5" not in four and all(np.isfinite(list(four.values())))
    assert "acc5" in zeroshot.classification_metrics(labels, ranks, labels, num_classes=5)


def test_class_embedding_is_the_normalized_mean_of_unit_vectors(fakes):
    texts = {"a cat": np.array([3.0, 0]), "the cat": np.array([0, 0.5])}
    got = zeroshot.class_embeddings(fakes.Predictor(texts), ["cat"], ["a {}", "the {c}"])
    np.testing.assert_allclose(got, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_shared_prompts_are_encoded_once(fakes):
    predictor = fakes.Predictor({"x": np.ones(2), "y": np.ones(2)})
    zeroshot.class_embeddings(predictor, ["a", "b"], {"a": ["x", "y"], "b": ["y"]})
    assert predictor.calls == [["x", "y"]]


def test_ranks_do_not_depend_on_chunk_and_ties_go_to_the_lower_class():
    rng = np.random.default_rng(0)
    emb, classes = rng.integers(-1, 2, (31, 3)) * 1.0, rng.integers(-1, 2, (9, 3)) * 1.0
    labels = rng.integers(0, 9, 31)
    order = np.argsort(-(emb @ classes.T), axis=1, kind="stable")
    for chunk in (1, 10, 100):
        predicted, ranks = zeroshot.true_class_ranks(emb, classes, labels, chunk=chunk)
        np.testing.assert_array_equal(predicted, order[:, 0])
        np.testing.assert_array_equal(ranks, (order == labels[:, None]).argmax(1))


def test_embeddings_that_are_not_finite_raise():
    emb = np.array([[np.nan, 1.0]])
    with pytest.raises(ValueError, match="image embeddings are not finite"):
        zeroshot.true_class_ranks(emb, np.eye(2), np.array([0]))


@pytest.mark.parametrize("scores", [[[np.nan, 1.0]], [[1.0, np.nan]], [[np.inf, 0.0]]])
def test_score_that_is_not_finite_raises_and_has_no_rank(scores):
    with pytest.raises(ValueError, match="1 of 1 rows of class scores are not finite"):
        zeroshot.ranks_from_scores(np.array(scores), np.array([0]))


@pytest.mark.parametrize("label", [-1, 2])
def test_label_outside_the_classes_has_no_rank(label):
    with pytest.raises(ValueError, match=r"labels are from .* expected 0 to 1"):
        zeroshot.ranks_from_scores(np.eye(2), np.array([0, label]))


def test_prompts_that_cancel_out_give_a_class_embedding_of_zeros(fakes):
    texts = {"a cat": np.array([1.0, 0]), "the cat": np.array([-1.0, 0])}
    got = zeroshot.class_embeddings(fakes.Predictor(texts), ["cat"], ["a {}", "the {}"])
    np.testing.assert_array_equal(got, [[0, 0]])


@pytest.mark.parametrize("bad_templates", [["a photo"], ["{}", "{}"], []])
def test_templates_without_the_class_name_raise(fakes, bad_templates):
    with pytest.raises(ValueError, match=r"templates? = |no prompts"):
        zeroshot.class_embeddings(fakes.Predictor(), ["cat", "dog"], bad_templates)


def test_label_outside_the_class_names_raises(fakes):
    source = [fakes.record(np.ones(2), label=2)]
    predictor = fakes.Predictor({"a": np.ones(2), "b": np.ones(2)})
    with pytest.raises(ValueError, match="invalid label, such as 2; expected labels from 0 to 1"):
        ZeroShot(source, ("a", "b"), "name")(predictor)


def test_unknown_template_error_lists_the_known_ones():
    with pytest.raises(ValueError, match="openai_imagenet"):
        ZeroShot([], ("a", "b"), "openai")


def test_openai_lists_have_80_prompts_and_1000_class_names():
    prompts = templates.TEMPLATES["openai_imagenet"]
    assert len(set(prompts)) == 80 and all(p.count("{}") == 1 for p in prompts)
    assert set(templates.SIMPLE_IMAGENET) <= set(prompts)
    names = templates.imagenet_classnames()
    assert len(names) == 1000 and names[0] == "tench" and names[-1] == "toilet paper"
