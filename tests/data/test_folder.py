import json
import pickle

import pytest
from PIL import Image

from imgtune_jax.data import BadRecord, CaptionSampler, FaultCause, build_source, decode_image


def save_image(folder, name, value):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, value, value)).save(folder / name)


def folder_source(folder, **options):
    return build_source({"name": "folder", "path": str(folder), **options})


@pytest.mark.parametrize("suffix, separator", [(".csv", "\t"), (".csv", ","), (".tsv", "\t")])
def test_tables_with_filepath_and_title(tmp_path, suffix, separator):
    for i in range(3):
        save_image(tmp_path, f"im/{i}.png", i)
    lines = [("filepath", "title"), ("im/0.png", "zero"), ("im/1.png", "one"),
             ("im/0.png", "null"), ("im/2.png", "zwei 狐")]  # fmt: skip
    table = tmp_path / f"t{suffix}"
    table.write_text("\n".join(separator.join(line) for line in lines) + "\n")
    records = folder_source(tmp_path, table=str(table))
    assert [r.captions["caption"] for r in records] == [("zero", "null"), ("one",), ("zwei 狐",)]
    assert [decode_image(r.image)[0, 0, 0] for r in records] == [0, 1, 2]


def test_jsonl_with_caption_lists_labels_and_groups(tmp_path):
    save_image(tmp_path, "a.png", 1)
    save_image(tmp_path, "b.png", 2)
    rows = [{"file": "a.png", "names": ["x", "y"], "en": "ex", "label": "dog", "id": 7},
            {"file": "b.png", "names": [], "en": "why", "label": "cat", "id": 7}]  # fmt: skip
    table = tmp_path / "t.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    records = folder_source(
        tmp_path, table=str(table), image_column="file", label="label", group="id",
        classes=("cat", "dog"), captions={"names": "names", "en": "en"},
    )  # fmt: skip
    assert records[0].captions == {"names": ("x", "y"), "en": ("ex",)}
    assert records[1].captions["names"] == ()
    assert [r.label for r in records] == [1, 0]
    assert records.class_names == ("cat", "dog")
    assert folder_source(tmp_path, table=str(table), image_column="file").class_names == ()
    assert records[0].group == records[1].group is not None
    assert records.read_metadata(0).image is None and records.read_metadata(0).captions["en"] == (
        "ex",
    )


def test_each_sub_folder_is_a_class(tmp_path):
    for name, value in (("cat/1.png", 1), ("cat/deep/2.png", 2), ("ant/3.png", 3)):
        save_image(tmp_path, name, value)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    records = folder_source(tmp_path)
    assert records.class_names == ("ant", "cat")
    assert [r.label for r in records] == [0, 1, 1]
    assert [r.captions for r in records] == [{"class": (c,)} for c in ("ant", "cat", "cat")]
    assert [r.label for r in folder_source(tmp_path, classes=("cat", "dog", "ant"))] == [0, 0, 2]


def test_bad_lines_of_a_table_affect_only_their_records(tmp_path):
    save_image(tmp_path, "a.png", 1)
    table = tmp_path / "t.csv"
    table.write_bytes(b"filepath,title\na.png,valid\nb.png,no file\nc.png,\xff\xfe\n,no path\n")
    records = folder_source(tmp_path, table=str(table))
    causes = [{name: bad.cause for name, bad in r.faults.items()} for r in records]
    assert causes[0] == {}
    assert causes[1] == {"image": FaultCause.MISSING_IMAGE}
    assert causes[2] == {"captions": FaultCause.BAD_UTF8, "image": FaultCause.MISSING_IMAGE}
    assert causes[3] == {"image": FaultCause.MISSING_IMAGE}
    jsonl = tmp_path / "t.jsonl"
    jsonl.write_bytes(b'{"filepath": "a.png", "title": "\xff"}\n{invalid\n{"title": "no path"}\n')
    records = folder_source(tmp_path, table=str(jsonl))
    causes = [{name: bad.cause for name, bad in r.faults.items()} for r in records]
    assert causes[0] == {"captions": FaultCause.BAD_UTF8}
    assert causes[1] == {"image": FaultCause.BAD_METADATA}
    assert causes[2] == {"image": FaultCause.MISSING_IMAGE}


def test_captions_that_are_not_utf8_make_a_record_bad(tmp_path):
    """A tokenizer raises an error on such text, which would end the run."""
    save_image(tmp_path, "a.png", 1)
    (tmp_path / "t.csv").write_bytes(b"filepath,title\na.png,\xff\xfe\n")
    (tmp_path / "t.jsonl").write_bytes(b'{"filepath": "a.png", "title": "\xff"}\n')
    for table in ("t.csv", "t.jsonl"):
        (record,) = folder_source(tmp_path, table=str(tmp_path / table))
        with pytest.raises(BadRecord, match="bad_utf8"):
            CaptionSampler({"caption": 1.0}).first(record)


def test_class_names_may_be_digits(tmp_path):
    save_image(tmp_path, "a.png", 1)
    table = tmp_path / "t.csv"
    table.write_text("filepath,title,label\na.png,one,3\n")
    assert folder_source(tmp_path, table=str(table), label="label")[0].label == 3
    assert (
        folder_source(tmp_path, table=str(table), label="label", classes=("5", "3"))[0].label == 1
    )


def test_errors_name_a_missing_folder_table_and_images(tmp_path):
    with pytest.raises(ValueError, match="is not a folder; set it"):
        folder_source(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"t\.csv' does not exist; set it"):
        folder_source(tmp_path, table=str(tmp_path / "t.csv"))
    with pytest.raises(ValueError, match="no images in"):
        folder_source(tmp_path)


def test_fingerprint_depends_on_content(tmp_path):
    save_image(tmp_path, "cat/1.png", 1)
    records = folder_source(tmp_path)
    before = records.fingerprint
    assert pickle.loads(pickle.dumps(records)).fingerprint == before
    assert folder_source(tmp_path).fingerprint == before
    save_image(tmp_path, "cat/1.png", 2)
    changed = folder_source(tmp_path).fingerprint
    assert changed != before
    save_image(tmp_path, "cat/2.png", 2)
    assert folder_source(tmp_path).fingerprint not in (before, changed)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_line_separator_in_a_caption_does_not_split_a_line(tmp_path, suffix, separator):
    save_image(tmp_path, "a.png", 1)
    save_image(tmp_path, "b.png", 2)
    rows = [("a.png", f"one{separator}two"), ("b.png", "three")]
    if suffix == ".jsonl":
        objects = [dict(filepath=file, title=title) for file, title in rows]
        lines = [json.dumps(x, ensure_ascii=False) for x in objects]
    else:
        delimiter = "," if suffix == ".csv" else "\t"
        lines = [delimiter.join(row) for row in [("filepath", "title"), *rows]]
    table = tmp_path / f"t{suffix}"
    table.write_text("\n".join(lines) + "\n", "utf-8")
    records = folder_source(tmp_path, table=str(table))
    assert [r.captions["caption"] for r in records] == [(rows[0][1],), ("three",)]
