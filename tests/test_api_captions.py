"""A captioner: training, evaluation, report, generated captions and errors."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import imgtune_jax
from imgtune_jax import cli, config, data, report
from imgtune_jax.evals import predictor
from tests import debug_run

ROOT = Path(__file__).parents[1]
NAMES = {
    "red": ("a red card", "红色的卡片"),
    "lime": ("a green card", "绿色的卡片"),
    "blue": ("the blue card", "蓝色卡"),
    "white": ("an empty card", "空白"),
    "black": ("the night", "夜晚"),
}


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """Return a folder: five images of one color, their names in two languages, and a tokenizer."""
    folder = tmp_path_factory.mktemp("cards")
    lines = ["filepath\ten\tzh"]
    for color, names in NAMES.items():
        Image.new("RGB", (32, 32), color).save(folder / f"{color}.png")
        lines.append("\t".join([f"{color}.png", *names]))
    (folder / "names.tsv").write_text("\n".join(lines) + "\n", encoding="utf8")
    texts = [text for names in NAMES.values() for text in (*names, "<en>", "<zh>")]
    data.train_tokenizer(texts, folder / "tokenizer", vocab_size=400, length=24)
    return folder


def settings(cards, **changes):
    """Return the config of a captioner that learns the cards in seconds."""
    c = debug_run.config_dict()
    c.name = "cards"
    c.model.text = ConfigDict()
    c.model.decoder = ConfigDict(
        dict(name="transformer", width=64, depth=2, mlp_dim=128, num_heads=2, vocab_size=400,
             max_length=24)
    )  # fmt: skip
    c.objectives = ConfigDict(dict(captioning=dict(weight=1.0)))
    c.tokenizer = ConfigDict(dict(path=str(cards / "tokenizer"), length=24))
    sets = dict(en="en", zh="zh")
    c.data.source = ConfigDict(
        dict(name="folder", path=str(cards), table=str(cards / "names.tsv"), captions=sets)
    )
    c.data.caption_weights = ConfigDict(dict(en=0.6, zh=0.4))
    c.data.prefixes = ConfigDict(dict(en="<en>", zh="<zh>"))
    c.data.transforms = ()
    c.evals = ConfigDict(
        {
            f"cards_{code}": dict(
                name="captioning",
                source=c.data.source,
                caption_set=code,
                prefix=f"<{code}>",
                language=code,
                limit=3,
            )
            for code in sets
        }
    )
    c.batch_size = 16
    c.total.steps = 120
    c.checkpoint.every.steps = 120
    c.optim.lr = 3e-3
    c.optim.ema_decay = None
    for key, value in changes.items():
        c[key] = value
    return config.parse_config(c)


@pytest.fixture(scope="module")
def run(cards, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    previous_folder = Path.cwd()
    os.chdir(ROOT)
    model = imgtune_jax.train(settings(cards), workdir)
    report.write_run_report(workdir, model.predictor)
    yield workdir
    os.chdir(previous_folder)


@pytest.fixture(scope="module")
def model(run):
    return imgtune_jax.load(run)


def paths(cards):
    return [cards / f"{color}.png" for color in NAMES]


@pytest.mark.parametrize(("language", "index"), [("en", 0), ("zh", 1), (None, 0)])
def test_captioner_generates_the_learned_names_in_the_given_language(model, cards, language, index):
    generated = model.caption(paths(cards), language=language)
    assert [captions[0].text for captions in generated] == [
        names[index] for names in NAMES.values()
    ]
    assert all(captions[0].score < 0 and len(captions) == 1 for captions in generated)
    assert model.languages == ("en", "zh")


def test_n_captions_are_sorted_and_independent_of_the_batch(model, cards):
    generated = model.caption(paths(cards), n=3, beam=4)
    for captions in generated:
        scores = [caption.score for caption in captions]
        assert len({caption.text for caption in captions}) == 3
        assert scores == sorted(scores, reverse=True)
    (alone,) = model.caption(cards / "blue.png", n=3, beam=4)
    texts, scores = zip(*alone, strict=True)
    batch_texts, batch_scores = zip(*generated[2], strict=True)
    assert texts == batch_texts
    np.testing.assert_allclose(scores, batch_scores, atol=1e-5)


def test_memo_uneven_batches_and_unreadable_images_change_no_value(
    model, cards, tmp_path, monkeypatch
):
    monkeypatch.setattr(predictor, "BATCH_SIZE", 8)
    (tmp_path / "bad.png").write_bytes(b"not an image")
    source = data.ImageList.from_images([*paths(cards), tmp_path / "bad.png", *paths(cards)])
    names = [names[0] for names in NAMES.values()]
    memoizing = dataclasses.replace(model.predictor, feature_memo={})
    for i, captioner in enumerate((model.predictor, memoizing, memoizing)):
        generated, valid = captioner.generate_captions(source, prefix="<en>")
        texts = [[caption.text for caption in captions] for captions in generated]
        assert texts == [[x] for x in names] + [[]] + [[x] for x in names]
        assert valid.tolist() == [True] * 5 + [False] + [True] * 5
        scored = captioner.caption_scores(source, [*names, "", *names], "<en>")
        assert scored.valid.tolist() == valid.tolist()
        mean_log_prob = np.where(scored.target_mask[:, 1:], scored.scores.log_prob, 0).sum(1)
        mean_log_prob /= scored.target_mask.sum(1)
        # A generated caption has the same score by cached decoding and by one forward pass.
        expected = [captions[0].score for captions in generated if captions]
        np.testing.assert_allclose(mean_log_prob[valid], expected, rtol=1e-4, err_msg=str(i))
        # Each image's name has the highest probability of all names.
        scores, readable = captioner.score_texts(
            source, names, prefix="<en>", normalize_length=True
        )
        assert readable.tolist() == valid.tolist()
        assert scores[valid].argmax(1).tolist() == [*range(5), *range(5)]
        np.testing.assert_allclose(scores[valid].max(1), expected, rtol=1e-4, err_msg=str(i))
    (tokens, _), *_ = memoizing.feature_memo.values()
    assert len(tokens) == 16 and not model.predictor.feature_memo


def test_samples_depend_on_the_seed_alone(model, cards):
    decoding = {"method": {"name": "sample", "n": 4, "temperature": 3.0}, "max_new_tokens": 5}

    def sample(seed):
        return model.caption(cards / "red.png", decoding=decoding, seed=seed)[0]

    assert sample(0) == sample(0) != sample(1)


def test_evaluation_reads_a_subset_during_training_and_all_images_in_the_command(run, capsys):
    lines = [json.loads(x) for x in (run / "results.jsonl").read_text().splitlines()]
    assert [x["task"] for x in lines] == ["captioning"] * 2
    assert [x["language"] for x in lines] == ["en", "zh"]
    assert lines[0]["metrics"]["num_images"] == 3
    cli.main(["eval", "--workdir", str(run)])
    new = [json.loads(x) for x in (run / "results.jsonl").read_text().splitlines()][2:]
    for line in new:
        metrics = line["metrics"]
        exact = {"num_images": 5, "exact_match": 1, "chrF": 100, "ROUGE_L": 1}
        assert {name: metrics[name] for name in exact} == exact
        assert 1 < metrics["perplexity"] < 2 and metrics["CIDEr"] > 1
    assert "BLEU-4" in capsys.readouterr().out


def test_report_shows_generated_captions_and_references(run):
    page = (run / "report.html").read_text("utf-8")
    assert "Captions of cards" in page and "No retrieval examples" not in page
    assert "5 of 5 images" in page
    for names in NAMES.values():
        assert all(name in page for name in names)


def test_caption_command_prints_captions(run, cards, capsys):
    cli.main(["caption", "--model", str(run), "--language", "zh", str(cards / "white.png")])
    assert capsys.readouterr().out == f"{cards / 'white.png'}: 空白\n"
    cli.main(["caption", "--model", str(run), "--n", "2", str(cards / "white.png")])
    path, *captions = capsys.readouterr().out.splitlines()
    assert path == str(cards / "white.png")
    assert len(captions) == 2 and "an empty card" in captions[0]


def test_caption_command_skips_an_unreadable_image(run, cards, tmp_path, capsys, caplog):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    for n in ("1", "2"):
        files = [str(tmp_path / "bad.png"), str(cards / "white.png")]
        cli.main(["caption", "--model", str(run), "--n", n, *files])
        out = capsys.readouterr().out
        assert out.startswith(str(cards / "white.png")) and "bad.png" not in out
        assert "bad.png: not_an_image" in caplog.text


def test_captioner_has_no_embeddings(model, cards):
    for call in (
        lambda: model.encode_image(cards / "red.png"),
        lambda: model.encode_text("a"),
        lambda: model.classify(cards / "red.png", ["a", "b"]),
        lambda: model.search("a", [cards / "red.png"]),
    ):
        with pytest.raises(ValueError, match="this model has no text tower"):
            call()


def test_error_names_the_bad_input(model, run, cards, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"bad\.png: not_an_image"):
        model.caption([cards / "red.png", tmp_path / "bad.png"])
    with pytest.raises(ValueError, match="language = 'fr'; expected one of en, zh"):
        model.caption(cards / "red.png", language="fr")
    with pytest.raises(ValueError, match="max_new_tokens = 99; this model generates at most 2"):
        model.caption(cards / "red.png", decoding={"max_new_tokens": 99})
    with pytest.raises(ValueError, match="n = 0, beam = 1; expected 1 or more"):
        model.caption(cards / "red.png", n=0)
    with pytest.raises(ValueError, match="n and beam configure a beam search"):
        model.caption(cards / "red.png", n=2, decoding={"method": {"name": "greedy"}})
    with pytest.raises(SystemExit, match=r"no image or folder at nowhere\.png"):
        cli.main(["caption", "--model", str(run), "nowhere.png"])
