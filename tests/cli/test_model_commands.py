"""The commands `embed`, `search`, `classify` and `caption`, with valid and invalid arguments."""

import contextlib
import io
import os

import numpy as np
import pytest

import imgtune_jax
from imgtune_jax import cli
from imgtune_jax.api import ProbabilityKind


@pytest.fixture
def imgtune(capsys, caplog):
    """Return a function that runs a command and returns (output, warnings)."""

    def run(*arguments):
        caplog.clear()
        cli.main([str(argument) for argument in arguments])
        return capsys.readouterr().out, caplog.text

    return run


def fails(capsys, *arguments):
    """Run a command that ends with an error; return its message."""
    with pytest.raises(SystemExit) as error:
        cli.main([str(argument) for argument in arguments])
    return str(error.value.code) + capsys.readouterr().err


def test_unreadable_file_is_listed_and_the_others_are_used(imgtune, softmax_model, photos):
    model = ("--model", softmax_model)
    commands = {
        "search": (*model, "--query", photos / "a.png", photos),
        "classify": (*model, "--labels", "cat", "dog", "--images", photos),
        "embed": (*model, "--output", photos.parent / "out.npz", photos),
    }
    for command, arguments in commands.items():
        out, warnings = imgtune(command, *arguments)
        assert "skipped 1 of 3 images" in warnings and "bad.png: not_an_image" in warnings
        assert command == "embed" or ("a.png" in out and "b.jpg" in out)
        assert "bad.png" not in out and "trash" not in out and "._a" not in out
    with np.load(photos.parent / "out.npz") as stored:
        assert [os.path.basename(p) for p in stored["image_paths"]] == ["a.png", "b.jpg"]
        assert np.isfinite(stored["image_features"]).all()


def test_command_fails_if_no_image_is_readable(capsys, softmax_model, photos):
    message = fails(capsys, "search", "--model", softmax_model, "--query", "x", photos / "bad.png")
    assert "these images cannot be read" in message and "bad.png: not_an_image" in message


def test_python_functions_skip_unreadable_images_on_request(softmax_model, photos):
    model = imgtune_jax.load(softmax_model)
    paths = [photos / "a.png", photos / "bad.png", photos / "b.jpg"]
    expected = model.encode_image([paths[0], paths[2]])
    embeddings = model.encode_image((p for p in paths), skip_unreadable=True)
    assert embeddings.dtype == np.float32 and np.isnan(embeddings[1]).all()
    np.testing.assert_allclose(embeddings[[0, 2]], expected, atol=1e-6)
    assert [hit.index for hit in model.search(paths[2], embeddings)] == [2, 0]
    labels = model.classify(paths, ["cat", "dog"], skip_unreadable=True)
    assert [len(row) for row in labels] == [2, 0, 2]
    with pytest.raises(ValueError, match=r"bad\.png"):
        model.classify(paths, ["cat", "dog"])


def test_texts_templates_and_galleries_may_be_generators(softmax_model, photos):
    model = imgtune_jax.load(softmax_model)
    texts = ["a dog", "a cat"]
    np.testing.assert_array_equal(model.encode_text(iter(texts)), model.encode_text(texts))
    assert model.search("a dog", iter(texts), k=1)[0].index == 0
    image, templates = photos / "a.png", ["a {}", "the {}"]
    assert model.classify(image, iter(["cat", "dog"]), iter(templates)) == model.classify(
        image, ["cat", "dog"], templates
    )


def test_model_with_a_bias_has_the_probability_of_each_pair(imgtune, sigmoid_model, photos):
    model = imgtune_jax.load(sigmoid_model)
    assert model.probability_kind is ProbabilityKind.SIGMOID
    image, labels = photos / "a.png", ["cat", "dog", "car"]
    (predicted,) = model.classify(image, labels)
    logits = model.predictor.logit_scale * (model.encode_image(image) @ model.encode_text(labels).T)
    expected = 1 / (1 + np.exp(-(logits[0] + model.predictor.logit_bias)))
    got = {label.name: label.probability for label in predicted}
    np.testing.assert_allclose([got[name] for name in labels], expected, rtol=1e-5)
    assert sum(got.values()) < 0.5
    out, _ = imgtune("classify", "--model", sigmoid_model, "--labels", "cat", "--images", image)
    assert out.splitlines()[0] == f"Probabilities: {ProbabilityKind.SIGMOID.value}"
    assert out.splitlines()[1] == f"{image}: cat {100 * got['cat']:.3g}%"


def test_model_without_a_bias_has_probabilities_among_the_labels(imgtune, softmax_model, photos):
    arguments = ("--labels", "cat", "dog", "--images", photos / "a.png")
    out, _ = imgtune("classify", "--model", softmax_model, *arguments)
    assert out.splitlines()[0] == f"Probabilities: {ProbabilityKind.SOFTMAX.value}"


def test_embed_names_the_file_that_it_writes_and_overwrites_none(
    imgtune, capsys, softmax_model, photos
):
    arguments = ("embed", "--model", softmax_model, "--output")
    out, _ = imgtune(*arguments, photos.parent / "out", photos / "a.png")
    path = photos.parent / "out.npz"
    assert out.startswith(f"{path}: ") and path.is_file()
    before = path.read_bytes()
    for output in (path, photos.parent / "out"):
        assert "out.npz exists; remove it" in fails(capsys, *arguments, output, photos / "b.jpg")
    assert path.read_bytes() == before


def test_embed_reads_one_text_per_line(imgtune, softmax_model, tmp_path):
    lines = ["a dog", "", "a\u2028b", "Straße"]
    (tmp_path / "texts").write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    output = tmp_path / "out.npz"
    imgtune("embed", "--model", softmax_model, "--texts", tmp_path / "texts", "--output", output)
    with np.load(output) as stored:
        assert list(stored["texts"]) == lines and len(stored["text_features"]) == 4


def test_invalid_arguments_end_in_one_message(capsys, softmax_model, photos):
    parent = photos.parent
    (parent / "latin1").write_bytes(b"a\ncaf\xe9\n")
    (parent / "empty").touch()
    (parent / "text.npz").write_bytes(b"no archive")
    np.savez(parent / "other.npz", x=np.zeros(2))
    np.savez(parent / "wide.npz", image_paths=["a"], image_features=np.zeros((1, 7), np.float32))
    (parent / "void").mkdir()
    model, image = ("--model", softmax_model), photos / "a.png"
    embed, search = ("embed", *model), ("search", *model, "--query")
    classify = ("classify", *model, "--images", image, "--labels")
    out = ("--output", parent / "out.npz")
    for arguments, message in (
        ((*embed, *out), "nothing to embed"),
        ((*embed, *out, "--texts", parent / "gone"), "no file at"),
        ((*embed, *out, "--texts", parent), "cannot be read: Is a directory"),
        ((*embed, *out, "--texts", parent / "latin1"), "latin1, line 2: the text is not UTF-8"),
        ((*embed, *out, "--texts", parent / "empty"), "is empty"),
        ((*embed, "--output", parent / "gone" / "out.npz", image), "no folder"),
        ((*embed, "--output", parent, image), "is a folder"),
        ((*embed, *out, parent / "void"), "no image in the folder"),
        ((*embed, *out, "-"), "no image or folder at -"),
        ((*search, "x", parent / "gone.npz"), "no file at"),
        ((*search, "x", parent / "text.npz"), "cannot be read"),
        ((*search, "x", parent / "other.npz"), "has no image_features"),
        ((*search, "x", parent / "wide.npz"), "encode the gallery with this model"),
        ((*search, "x", "-k", "0", image), "expected an integer of 1 or more"),
        ((*search, "x", "--query", "y", image), "--query is given twice"),
        ((*search, "gone.png", image), "no image at gone.png"),
        ((*search, "caf\udce9", image), "is not Unicode"),
        ((*classify, "cat", "cat"), "distinct labels"),
        ((*classify, "cat"), "2 or more distinct labels"),
        ((*classify, "cat", "dog", "--templates", "a photo"), "template = 'a photo'"),
        (("caption", *model, image), "this model has no decoder"),
        (("caption", *model, "--n", "0", image), "expected an integer of 1 or more"),
        (("info", image), "no config at"),
        (("frobnicate",), "invalid choice"),
    ):
        text = fails(capsys, *arguments)
        assert message in text and "Traceback" not in text, (arguments, text)
    assert not (parent / "out.npz").exists()


def test_home_folder_is_expanded_in_arguments(imgtune, softmax_model, photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos.parent))
    os.symlink(softmax_model, photos.parent / "model")
    out, _ = imgtune("search", "--model", "~/model", "--query", "~/photos/a.png", "~/photos")
    assert out.splitlines()[0] == f"1.000  {photos / 'a.png'}"


def ascii_output(*commands):
    """Return what commands print to a terminal that encodes ASCII only."""
    buffer = io.BytesIO()
    terminal = io.TextIOWrapper(buffer, encoding="ascii")
    with contextlib.redirect_stdout(terminal):
        for arguments in commands:
            with contextlib.suppress(SystemExit):
                cli.main([str(argument) for argument in arguments])
        terminal.flush()
    return buffer.getvalue().decode("ascii")


def test_file_names_and_labels_outside_the_terminals_encoding_are_escaped(softmax_model, photos):
    name = os.fsdecode(b"caf\xe9.png")  # Latin-1
    os.rename(photos / "a.png", photos / name)
    output, model = photos.parent / "out.npz", ("--model", softmax_model)
    text = ascii_output(
        ("embed", *model, "--output", output, photos),
        ("search", *model, "--query", "x", output),
        ("classify", *model, "--labels", "红", "dog", "--images", photos / name),
    )
    assert text.count(r"caf\udce9.png") == 2 and r"\u7ea2" in text
    with np.load(output) as stored:
        assert str(photos / name) in stored["image_paths"]


def test_help_is_printed_to_a_terminal_that_is_not_utf8():
    text = ascii_output(["--help"], ["train", "--help"])
    assert "usage: imgtune [-h] command" in text and "usage: imgtune train" in text
