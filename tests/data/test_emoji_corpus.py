"""The emoji corpus agrees with its README, and can be rebuilt from the npm packages."""

import hashlib
import json
import os
import runpy
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from configs import caption_emoji, coca_emoji
from imgtune_jax.data import load_tokenizer

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "corpora" / "emoji"
VENDORS = {"google.webp", "twitter.webp", "fluent.webp"}
LANGUAGES = {"en", "zh", "de", "es", "fr", "ar", "hi", "sw", "ja", "ru"}


def read_tar(name):
    with tarfile.open(CORPUS / name) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


@pytest.fixture(scope="module")
def tars():
    return {name: read_tar(f"{name}.tar") for name in ("seen", "heldout")}


def concepts(files):
    return [json.loads(data) for name, data in files.items() if name.endswith(".json")]


def test_number_of_concepts_and_files(tars):
    assert len(concepts(tars["seen"])) == 1573
    assert len(concepts(tars["heldout"])) == 279
    for files in tars.values():
        extensions = Counter(name.split(".", 1)[1] for name in files)
        assert set(extensions) == VENDORS | {"json"}
        assert len(set(extensions.values())) == 1, extensions


def test_split_is_by_subcategory(tars):
    for name, files in tars.items():
        for record in concepts(files):
            subcategory = record["subcategory"]
            digest = int(hashlib.sha256(subcategory.encode()).hexdigest(), 16)
            is_held_out = digest % 5 == 0 and subcategory != "country-flag"
            assert is_held_out == (name == "heldout"), subcategory


def test_every_concept_has_a_name_and_keywords_in_every_language(tars):
    records = [r for files in tars.values() for r in concepts(files)]
    assert len({r["concept"] for r in records}) == 1852
    for record in records:
        assert set(record["name"]) == set(record["keywords"]) == LANGUAGES
        assert all(record["name"].values()) and all(record["keywords"].values())
    for language in LANGUAGES:
        assert len({r["name"][language] for r in records}) == 1852


def test_corpus_is_under_15_megabytes():
    assert sum(p.stat().st_size for p in CORPUS.rglob("*") if p.is_file()) < 15_000_000


def test_checksums_match():
    checksums = dict(
        line.split()[::-1] for line in (CORPUS / "SHA256SUMS").read_text().splitlines()
    )
    assert set(checksums) == {"seen.tar", "heldout.tar"}
    for name, expected in checksums.items():
        assert hashlib.sha256((CORPUS / name).read_bytes()).hexdigest() == expected


def test_every_license_text_is_included():
    phrases = {
        "Apache-2.0.txt": "Apache License",
        "CC-BY-4.0.txt": "Creative Commons Attribution 4.0 International",
        "MIT-emoji-data.txt": "Copyright (c) 2013 Cal Henderson",
        "MIT-fluent-emoji.txt": "Copyright (c) Microsoft Corporation.",
        "Unicode-3.0.txt": "UNICODE LICENSE V3",
    }
    assert {p.name for p in (CORPUS / "LICENSES").iterdir()} == set(phrases)
    for name, phrase in phrases.items():
        assert phrase in (CORPUS / "LICENSES" / name).read_text()


def test_build_rejects_a_changed_package(tmp_path):
    build = runpy.run_path(str(CORPUS / "build.py"))
    for file, _ in build["PACKAGES"].values():
        (tmp_path / file).write_bytes(b"changed")
    with pytest.raises(ValueError, match=r"has sha256 .*; expected .*; download"):
        build["verify"](tmp_path)


@pytest.mark.skipif(
    "EMOJI_PACKAGES" not in os.environ,
    reason="EMOJI_PACKAGES, the folder of the five .tgz packages, is not set (takes two minutes)",
)
def test_rebuilt_corpus_is_equal_byte_for_byte(tmp_path):
    build = runpy.run_path(str(CORPUS / "build.py"))
    build["build_corpus"](Path(os.environ["EMOJI_PACKAGES"]), tmp_path)
    for name in ("seen.tar", "heldout.tar", "SHA256SUMS"):
        assert (tmp_path / name).read_bytes() == (CORPUS / name).read_bytes()


def test_tokenizer_can_be_trained_again_from_the_training_names_alone(tmp_path):
    """The files are the same. All names in all languages are encoded losslessly, none truncated."""
    folder = CORPUS / "tokenizer"
    subprocess.run(
        [sys.executable, "-m", "corpora.emoji.tokenizer", "--out", tmp_path], check=True, cwd=ROOT
    )
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file
    tokenizer = load_tokenizer(folder, length=caption_emoji.LENGTH)
    english_tokenizer = load_tokenizer(folder, length=coca_emoji.LENGTH)
    for split in ("seen", "heldout"):
        names_by_language = [c["name"] for c in concepts(read_tar(f"{split}.tar"))]
        _, english_mask = english_tokenizer([n["en"] for n in names_by_language])
        assert english_mask.sum(1).max() < english_tokenizer.length
        names = [n for by_language in names_by_language for n in by_language.values()]
        ids, mask = tokenizer(names)
        assert mask.sum(1).max() < tokenizer.length  # one token remains for a prompt
        decoded = [
            tokenizer.backend.decode(row[row_mask].tolist()).strip()
            for row, row_mask in zip(ids, mask, strict=True)
        ]
        assert decoded == names
