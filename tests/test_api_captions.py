"""Captioning as a user meets it: train, judge, read the report, write captions, err."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import imgtune_jax
from imgtune_jax import api, cli, config, data, report
from imgtune_jax.evals import predictor
from imgtune_jax.training import loop
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
    """Five cards of one colour each, named in two languages, and a tokenizer of the names."""
    folder = tmp_path_factory.mktemp("cards")
    lines = ["filepath\ten\tzh"]
    for colour, names in NAMES.items():
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
        lines.append("\t".join([f"{colour}.png", *names]))
    (folder / "names.tsv").write_text("\n".join(lines) + "\n", encoding="utf8")
    texts = [text for names in NAMES.values() for text in (*names, "<en>", "<zh>")]
    data.train_tokenizer(texts, folder / "tokenizer", vocab_size=400, length=24)
    return folder


def settings(cards, **changes):
    """A captioner of the cards, small enough to learn them in seconds."""
    c = debug_run.config_dict()
    c.name = "cards"
    c.model.text = ConfigDict()
    c.model.decoder = ConfigDict(
        dict(name="transformer", width=64, depth=2, mlp_dim=128, num_heads=2, vocab_size=400,
             max_new_tokens=24)
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
    before = Path.cwd()
    os.chdir(ROOT)
    report.write_run_report(workdir, loop.train(settings(cards), workdir))
    yield workdir
    os.chdir(before)


@pytest.fixture(scope="module")
def model(run):
    return imgtune_jax.load(run)


def paths(cards):
    return [cards / f"{colour}.png" for colour in NAMES]


@pytest.mark.parametrize(("language", "place"), [("en", 0), ("zh", 1), (None, 0)])
def test_a_captioner_that_learnt_its_images_names_them_in_the_language_asked(
    model, cards, language, place
):
    got = model.caption(paths(cards), language=language)
    assert [own[0].text for own in got] == [names[place] for names in NAMES.values()]
    assert all(own[0].score < 0 and len(own) == 1 for own in got)
    assert model.languages == ("en", "zh")


def test_n_best_come_best_first_and_do_not_depend_on_the_batch(model, cards):
    got = model.caption(paths(cards), n=3, beam=4)
    for own in got:
        scores = [w.score for w in own]
        assert len({w.text for w in own}) == 3 and scores == sorted(scores, reverse=True)
    (alone,) = model.caption(cards / "blue.png", n=3, beam=4)
    assert [w.text for w in alone] == [w.text for w in got[2]]
    np.testing.assert_allclose([w.score for w in alone], [w.score for w in got[2]], atol=1e-5)


def test_kept_image_tokens_uneven_batches_and_broken_images_change_nothing(
    model, cards, tmp_path, monkeypatch
):
    monkeypatch.setattr(predictor, "BATCH_SIZE", 8)
    (tmp_path / "bad.png").write_bytes(b"not an image")
    source = api._ImageSource.of([*paths(cards), tmp_path / "bad.png", *paths(cards)])
    names = [names[0] for names in NAMES.values()]
    keeping = dataclasses.replace(model.encoders, feature_memo={})
    for i, one in enumerate((model.encoders, keeping, keeping)):
        written, valid = one.captions(source, prefix="<en>")
        assert [[w.text for w in own] for own in written] == [[x] for x in names] + [[]] + [
            [x] for x in names
        ]
        assert valid.tolist() == [True] * 5 + [False] + [True] * 5
        found = one.caption_scores(source, [*names, "", *names], "<en>")
        assert found.valid.tolist() == valid.tolist()
        mean = np.where(found.target_mask[:, 1:], found.scores.log_prob, 0).sum(1)
        mean /= found.target_mask.sum(1)
        # Greedy decoding scores the caption it wrote: cached steps and one pass agree.
        want = [own[0].score for own in written if own]
        np.testing.assert_allclose(mean[valid], want, rtol=1e-4, err_msg=str(i))
        # And of all names, each image's own is the likeliest.
        scores, readable = one.answer_scores(source, names, prefix="<en>", normalize_length=True)
        assert readable.tolist() == valid.tolist()
        assert scores[valid].argmax(1).tolist() == [*range(5), *range(5)]
        np.testing.assert_allclose(scores[valid].max(1), want, rtol=1e-4, err_msg=str(i))
    (tokens, _), *_ = keeping.kept.values()
    assert len(tokens) == 16 and not model.encoders.kept


def test_draws_follow_the_seed(model, cards):
    asked = {"method": {"name": "sample", "n": 4, "temperature": 3.0}, "max_new_tokens": 5}

    def drawn(seed):
        return model.caption(cards / "red.png", decoding=asked, seed=seed)[0]

    assert drawn(0) == drawn(0) != drawn(1)


def test_evaluation_in_the_loop_judges_a_subset_and_alone_judges_all(run, capsys):
    lines = [json.loads(x) for x in (run / "results.jsonl").read_text().splitlines()]
    assert [x["task"] for x in lines] == ["captioning"] * 2
    assert [x["language"] for x in lines] == ["en", "zh"]
    assert lines[0]["metrics"]["num_images"] == 3
    cli.main(["eval", "--workdir", str(run)])
    new = [json.loads(x) for x in (run / "results.jsonl").read_text().splitlines()][2:]
    for line in new:
        m = line["metrics"]
        assert (m["num_images"], m["exact_match"], m["chrF"], m["ROUGE_L"]) == (5, 1, 100, 1)
        assert 1 < m["perplexity"] < 2 and m["CIDEr"] > 1
    assert "BLEU-4" in capsys.readouterr().out


def test_report_shows_references_beside_predictions(run):
    page = (run / "report.html").read_text("utf-8")
    assert "Captions of cards" in page and "No retrieval gallery" not in page
    assert "5 of 5 images" in page
    for names in NAMES.values():
        assert all(name in page for name in names)


def test_command_line_writes_captions(run, cards, capsys):
    cli.main(["caption", "--model", str(run), "--language", "zh", str(cards / "white.png")])
    assert capsys.readouterr().out == f"{cards / 'white.png'}: 空白\n"
    cli.main(["caption", "--model", str(run), "--n", "2", str(cards / "white.png")])
    first, *found = capsys.readouterr().out.splitlines()
    assert first == str(cards / "white.png") and len(found) == 2 and "an empty card" in found[0]


def test_wrong_input_is_named(model, run, cards, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"bad\.png: not_an_image"):
        model.caption([cards / "red.png", tmp_path / "bad.png"])
    with pytest.raises(ValueError, match="no language 'fr'; this model writes: en, zh"):
        model.caption(cards / "red.png", language="fr")
    with pytest.raises(ValueError, match="max_new_tokens = 99; this model generates at most 2"):
        model.caption(cards / "red.png", decoding={"max_new_tokens": 99})
    with pytest.raises(ValueError, match="n = 0, beam = 1; wanted 1 or more"):
        model.caption(cards / "red.png", n=0)
    with pytest.raises(ValueError, match="decoding has a method of its own"):
        model.caption(cards / "red.png", n=2, decoding={"method": {"name": "greedy"}})
    with pytest.raises(SystemExit, match=r"no image or folder at nowhere\.png"):
        cli.main(["caption", "--model", str(run), "nowhere.png"])
