import json
import os
import pickle

import pytest
from PIL import Image

from imgtune_jax.data import BadRecord, CaptionSampler, FaultCause, build_source, decode_image
from imgtune_jax.data.record import group_id
from imgtune_jax.errors import UserError


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
    plain = folder_source(tmp_path, table=str(table), image_column="file", captions={"c": "en"})
    assert plain.class_names == ()
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


def table_records(folder, table, text, **options):
    (folder / table).write_bytes(text if isinstance(text, bytes) else text.encode())
    source = folder_source(folder, table=str(folder / table), **options)
    return [source[i] for i in range(len(source))]


def causes(record):
    return {name: bad.cause for name, bad in record.faults.items()}


def test_a_table_without_its_columns_is_an_error_at_start(tmp_path):
    save_image(tmp_path, "a.png", 1)
    with pytest.raises(UserError, match=r"no columns \['filepath', 'name'\]; it has \['image'"):
        table_records(tmp_path, "t.csv", "image,title\na.png,x\n", captions={"c": "name"})
    with pytest.raises(UserError, match=r"no columns \['label', 'group'\]"):
        table_records(tmp_path, "t.csv", "filepath,title\na.png,x\n", label="label", group="group")


def test_values_that_are_no_text_are_faults_of_their_record(tmp_path):
    save_image(tmp_path, "a.png", 1)
    values = ["3", "NaN", '["x", 3]', '[["x"]]', '{"en": "x"}', '"\\ud800"', "9" * 5000, "true"]
    for lines in (
        [f'{{"filepath": "{i}.png", "title": {v}}}' for i, v in enumerate(values)],
        # as a further line of an image, too
        [f'{{"filepath": "{i}.png", "title": {t}}}'
         for i, v in enumerate(values) for t in ('"x"', v)],
    ):  # fmt: skip
        records = table_records(tmp_path, "t.jsonl", "\n".join(lines))
        expected = [FaultCause.BAD_METADATA] * len(values)
        expected[5] = FaultCause.BAD_UTF8
        assert [r.faults["captions"].cause for r in records] == expected


def test_labels_that_are_no_class_are_faults_of_their_record(tmp_path):
    save_image(tmp_path, "a.png", 1)
    values = ["3", " 4 ", "²", "-1", "3.0", "", "9" * 5000, "99999999999"]
    lines = "".join(f"{i}.png,x,{value}\n" for i, value in enumerate(values))
    records = table_records(tmp_path, "t.csv", "filepath,title,label\n" + lines, label="label")
    assert [r.label for r in records] == [3, 4] + [None] * 6
    assert {r.faults["label"].cause for r in records[2:]} == {FaultCause.MISSING_LABEL}


def test_records_without_a_group_are_not_in_one_group(tmp_path):
    save_image(tmp_path, "a.png", 1)
    text = "filepath,title,g\na.png,x,7\nb.png,x,\nc.png,x, \n"
    records = table_records(tmp_path, "t.csv", text, group="g")
    assert records[0].group == group_id("7")
    assert [causes(r)["group"] for r in records[1:]] == [FaultCause.BAD_METADATA] * 2


def test_lines_of_one_image_with_different_labels_are_a_fault(tmp_path):
    save_image(tmp_path, "a.png", 1)
    text = "filepath,title,label\na.png,x,1\na.png,y,1\nb.png,x,1\nb.png,y,2\n"
    same, different = table_records(tmp_path, "t.csv", text, label="label")
    assert same.label == 1 and not same.faults
    assert different.label is None and "t.csv line 5" in different.faults["label"].detail


def test_captions_in_nested_fields_of_further_lines_are_added(tmp_path):
    save_image(tmp_path, "a.png", 1)
    lines = [{"filepath": "a.png", "title": {"en": x, "de": "y"}} for x in ("one", "two")]
    (record,) = table_records(
        tmp_path, "t.jsonl", "\n".join(map(json.dumps, lines)), captions={"en": ("title", "en")}
    )
    assert record.captions == {"en": ("one", "two")}


def test_a_path_that_leaves_the_folder_is_a_fault(tmp_path):
    folder = tmp_path / "images"
    save_image(folder, "a.png", 1)
    save_image(tmp_path, "outside.png", 2)
    paths = ["a.png", "sub/../a.png", "./a.png", str(folder / "a.png"),
             "../outside.png", "sub/../../outside.png", str(tmp_path / "outside.png"),
             f"{folder}/../outside.png", f"{folder}2/a.png"]  # fmt: skip
    text = "filepath,title\n" + "".join(f"{path},x\n" for path in paths)
    records = table_records(folder, "t.csv", text)
    assert all(decode_image(r.image)[0, 0, 0] == 1 and not r.faults for r in records[:4])
    assert [causes(r) for r in records[4:]] == [{"image": FaultCause.UNREADABLE_FILE}] * 5
    assert "line 6: '../outside.png' is outside of path" in records[4].faults["image"].detail
    with pytest.raises(
        UserError, match=r"is outside of path .* set path to a folder that contains"
    ):
        table_records(folder, "t.csv", "filepath,title\n../outside.png,x\n")


def test_absolute_paths_are_read_with_the_root_as_path(tmp_path):
    save_image(tmp_path, "a.png", 1)
    (tmp_path / "t.csv").write_text(f"filepath,title\n{tmp_path}/a.png,x\n")
    (record,) = folder_source("/", table=str(tmp_path / "t.csv"))
    assert decode_image(record.image)[0, 0, 0] == 1


def test_paths_relative_to_the_working_directory_are_read_with_a_dot_as_path(tmp_path, monkeypatch):
    save_image(tmp_path, "data/a.png", 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("filepath,title\ndata/a.png,x\n")
    (record,) = folder_source(".", table="t.csv")
    assert decode_image(record.image)[0, 0, 0] == 1


def test_a_path_that_is_no_regular_file_is_a_fault_and_does_not_block(tmp_path):
    save_image(tmp_path, "a.png", 1)
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # a sparse file
    names = ["fifo", "folder", "zero", "huge", "null\\u0000byte", "n" * 300]
    lines = [f'{{"filepath": "{name}.png", "title": "x"}}' for name in ("a", *names)]
    source = folder_source(tmp_path, table=write_lines(tmp_path / "t.jsonl", lines))
    found = [causes(source[i]).get("image") for i in range(len(source))]
    assert found == [None] + [FaultCause.UNREADABLE_FILE] * 4 + [FaultCause.MISSING_IMAGE] * 2
    assert source.fingerprint


def write_lines(path, lines):
    path.write_text("\n".join(lines))
    return str(path)


def test_hidden_files_and_folders_are_no_records_and_no_classes(tmp_path):
    save_image(tmp_path, "cat/1.png", 1)
    save_image(tmp_path, "dog/1.png", 1)
    for name in (".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", "cat/._1.png",
                 "dog/.ipynb_checkpoints/1.png", ".hidden.png"):  # fmt: skip
        save_image(tmp_path, name, 2)
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    source = folder_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert [source[i].key for i in range(len(source))] == ["cat/1.png", "dog/1.png"]


def test_a_folder_or_file_with_an_image_suffix_counts_by_its_type(tmp_path):
    save_image(tmp_path, "cat/folder.png/1.JPG", 1)
    assert [r.key for r in folder_source(tmp_path)] == ["cat/folder.png/1.JPG"]


@pytest.mark.parametrize(
    "files, options, warning",
    [
        (("cat/1.png",), {}, "the only class, so all labels and captions are equal (1): cat"),
        (("cat/1.png", "dog/a.txt"), {}, "classes without images (1): dog"),
        (("cat/1.png", "dog/1.png"), {"classes": ("cat", "cow")}, "without images (1): cow"),
        (("cat/1.png", "dog/1.png"), {"classes": ("cat",)}, "and are not used (1): dog"),
        (("cat/1.png", "dog/1.png", "x.png"), {}, "have no class and are not used (1): x.png"),
        (("train/cat/1.png", "val/cat/1.png"), {}, "is the outermost folder (2): train/cat/1.png"),
        (("cat/1.png", "dog/1.png"), {}, None),
    ],
)  # fmt: skip
def test_layouts_that_may_be_mistakes_are_logged(tmp_path, caplog, files, options, warning):
    for name in files:
        if name.endswith(".png"):
            save_image(tmp_path, name, 1)
        else:
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_text("text")
    folder_source(tmp_path, **options)
    assert warning in caplog.text if warning else not caplog.messages


def test_images_beside_the_sub_folders_only_are_an_error(tmp_path):
    save_image(tmp_path, "x.png", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images in .* images beside .*: x\.png; classes"):
        folder_source(tmp_path)
