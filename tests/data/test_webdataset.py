import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imgtune_jax.data import FaultCause, build_source, decode_image, tar_index, webdataset
from imgtune_jax.data.record import group_id
from imgtune_jax.errors import UserError
from tests.data.conftest import build_tar_source, valid_files, write_tar

CORPUS = Path(__file__).parents[2] / "corpora" / "emoji"


def png(value, size=(6, 4)):
    out = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(out, "PNG")
    return out.getvalue()


def to_json(value):
    return json.dumps(value).encode()


@pytest.fixture
def tar(tmp_path):
    files = {}
    for i in range(5):
        files[f"dir/{i:03d}.png"] = png(i)
        files[f"dir/{i:03d}.json"] = to_json(
            {"name": {"en": f"name {i}", "de": f"Name {i}"}, "tags": ["x", f"tag {i}"],
             "kind": "even" if i % 2 == 0 else "odd", "n": i % 3}
        )  # fmt: skip
    return write_tar(tmp_path / "a.tar", files)


def tar_source(path, **options):
    return build_source({"name": "webdataset", "path": path, **options})


def test_captions_label_group_and_filter_come_from_the_json(tar):
    records = tar_source(
        tar,
        captions={"name": ("name", "de"), "tags": ("tags",)},
        label=("kind",),
        classes=("odd", "even"),
        group=("n",),
        where={"n": (0, 1)},
    )
    assert len(records) == 4
    record = records[1]
    assert record.key == "a.tar:dir/001.png"
    assert record.captions == {"name": ("Name 1",), "tags": ("x", "tag 1")}
    assert record.label == 0 and records[0].label == 1
    assert record.group == group_id(1) and records[0].group == records[2].group
    assert decode_image(record.image)[0, 0, 0] == 1
    assert not record.faults


def test_read_metadata_returns_the_record_without_its_image(tar):
    records = tar_source(tar, captions={"name": ("name", "en")})
    partial, full = records.read_metadata(2), records[2]
    assert partial.image is None and full.image is not None
    assert partial.key == full.key and partial.captions == full.captions
    assert partial.metadata == full.metadata


def test_default_captions_come_from_txt_or_json(tmp_path):
    files = {
        "a.jpg": b"", "a.txt": b"aus txt", "a.json": to_json({"caption": "not this"}),
        "b.jpg": b"", "b.json": to_json({"caption": "from caption"}),
        "c.jpg": b"", "c.json": to_json({"text": "from text"}),
        "d.jpg": b"",
    }  # fmt: skip
    records = tar_source(write_tar(tmp_path / "a.tar", files))
    captions = [records[i].captions["caption"] for i in range(4)]
    assert captions == [("aus txt",), ("from caption",), ("from text",), ()]


def test_each_listed_image_of_a_key_is_a_record():
    two_vendors = tar_source(str(CORPUS / "heldout.tar"), image=("google.webp", "fluent.webp"))
    one_vendor = tar_source(str(CORPUS / "heldout.tar"), image=("fluent.webp",))
    assert len(two_vendors) == 2 * len(one_vendor) == 558
    assert two_vendors[0].key.endswith(".google.webp")
    assert two_vendors[1].key.endswith(".fluent.webp")
    assert two_vendors[1].image == one_vendor[0].image


def test_group_ids_of_the_emoji_do_not_collide():
    path = str(CORPUS / "{seen,heldout}.tar")
    records = tar_source(path, image=("google.webp",), group=("concept",))
    assert len({records.read_metadata(i).group for i in range(len(records))}) == 1852


def test_patterns_lists_and_braces_select_the_same_shards(tmp_path):
    paths = [write_tar(tmp_path / f"s-{i:03d}.tar", {f"{i}.png": png(i)}) for i in range(3)]
    for path in (paths, f"{tmp_path}/s-{{000..002}}.tar", f"{tmp_path}/s-*.tar",
                 f"{tmp_path}/s-00{{0,1,2}}.tar"):  # fmt: skip
        records = tar_source(path)
        assert [decode_image(records[i].image)[0, 0, 0] for i in range(3)] == [0, 1, 2]


def test_errors_name_missing_shards(tmp_path):
    write_tar(tmp_path / "s-000.tar", {"0.png": png(0)})
    with pytest.raises(ValueError, match=r"no tar at .*s-001\.tar"):
        tar_source(f"{tmp_path}/s-{{000..001}}.tar")
    with pytest.raises(ValueError, match=r"no tar at .*missing"):
        tar_source(f"{tmp_path}/missing*.tar")
    with pytest.raises(ValueError, match="has no path"):
        tar_source(())
    with pytest.raises(ValueError, match="expected a local path"):
        tar_source("gs://bucket/a.tar")
    with pytest.raises(ValueError, match="no records"):
        tar_source(str(tmp_path / "s-000.tar"), where={"kind": ("x",)})


def test_compressed_tar_is_rejected(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(ValueError, match="no random access"):
        tar_source(str(path))


def test_hidden_files_links_and_folders_are_not_records(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("dir")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("dir/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name in ("dir/._0.png", "dir/0.png", "dir/readme"):
            info = tarfile.TarInfo(name)
            info.size = len(png(0))
            tar.addfile(info, io.BytesIO(png(0)))
    records = tar_source(str(path))
    assert [records[i].key for i in range(len(records))] == ["a.tar:dir/0.png"]


def test_long_member_names_are_read(tmp_path):
    name = "d" * 120 + "/" + "k" * 150 + ".png"
    records = tar_source(write_tar(tmp_path / "a.tar", {name: png(9)}, format=tarfile.PAX_FORMAT))
    assert records[0].key.endswith(name) and decode_image(records[0].image)[0, 0, 0] == 9


def test_complete_members_of_a_truncated_tar_are_read(tmp_path, caplog):
    path = Path(write_tar(tmp_path / "a.tar", {f"{i}.png": png(i, (200, 200)) for i in range(3)}))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[2]
    path.write_bytes(data[: last.offset_data + 20])
    records = tar_source(str(path))
    assert decode_image(records[1].image)[0, 0, 0] == 1
    assert "is truncated: " in caplog.text
    assert len(records) == 3 and records[2].image is None
    assert records[2].faults["image"].cause is FaultCause.UNREADABLE_FILE


def test_faults_are_recorded_by_field(tmp_path):
    files = {
        "a.png": png(0), "a.json": b'{"caption": "\xff\xfe"}',
        "b.png": png(0), "b.json": b"{not json",
        "c.json": to_json({"caption": "no image"}),
        "d.png": png(0), "d.json": to_json({"caption": 3, "label": "cat"}),
        "e.png": png(0), "e.json": b"[1]",
    }  # fmt: skip
    records = tar_source(write_tar(tmp_path / "a.tar", files), label=("label",), group=("id",))
    causes = [{name: bad.cause for name, bad in records[i].faults.items()} for i in range(5)]
    label = {"label": FaultCause.MISSING_LABEL, "group": FaultCause.BAD_METADATA}
    assert causes[0] == {"captions": FaultCause.BAD_UTF8, **label}
    assert causes[1] == {"captions": FaultCause.BAD_METADATA, **label}
    assert causes[2] == {"image": FaultCause.MISSING_IMAGE, **label}
    assert causes[3] == {"captions": FaultCause.BAD_METADATA, **label}
    assert causes[4] == {"captions": FaultCause.BAD_METADATA, **label}
    assert records[2].captions == {"caption": ("no image",)}


def test_source_can_be_pickled(tar):
    records = tar_source(tar, captions={"name": ("name", "en")})
    copy = pickle.loads(pickle.dumps(records))
    assert copy.fingerprint == records.fingerprint and copy[3] == records[3]


def test_digest_of_the_listing_depends_on_content_and_options_and_not_on_path(tar, tmp_path):
    first = tar_source(tar).listing_fingerprint
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    copy = moved / "b.tar"
    copy.write_bytes(Path(tar).read_bytes())
    assert tar_source(str(copy)).listing_fingerprint == first
    assert tar_source(tar, captions={"name": ("name", "en")}).listing_fingerprint != first
    assert tar_source(tar, where={"n": (0,)}).listing_fingerprint != first
    data = Path(tar).read_bytes()
    copy.write_bytes(data.replace(b"name 4", b"NAME 4"))  # same sizes, other bytes
    assert tar_source(str(copy)).listing_fingerprint != first


def test_index_of_a_large_tar_is_cached(tar, monkeypatch, tmp_path):
    monkeypatch.setattr(tar_index, "CACHE_MIN_BYTES", 0)
    first = tar_source(tar, captions={"name": ("name", "en")})
    index_file = Path(tar + ".index.npz")
    assert index_file.is_file()
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "_scan_headers", lambda path: pytest.fail("scanned again"))
        second = tar_source(tar, captions={"name": ("name", "en")})
    assert [second[i] for i in range(5)] == [first[i] for i in range(5)]
    write_tar(
        Path(tar), {"new.png": png(7)}
    )  # with another size and time, so the cached index is invalid
    assert len(tar_source(tar)) == 1
    index_file.write_bytes(b"damaged")
    assert len(tar_source(tar)) == 1


def test_index_is_in_the_users_cache_if_the_folder_is_not_writable(tar, monkeypatch, tmp_path):
    monkeypatch.setattr(tar_index, "CACHE_MIN_BYTES", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path(tar + ".index.npz").mkdir()  # even root cannot replace a folder by a file
    tar_source(tar)
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    monkeypatch.setattr(tar_index, "_scan_headers", lambda path: pytest.fail("scanned again"))
    assert len(tar_source(tar)) == 5


def test_cached_index_executes_no_code(tar, monkeypatch):
    monkeypatch.setattr(tar_index, "CACHE_MIN_BYTES", 0)
    stat = Path(tar).stat()
    stamp = np.array([tar_index.INDEX_VERSION, stat.st_size, stat.st_mtime_ns])

    class Malicious:
        def __reduce__(self):
            return pytest.fail, ("executed",)

    np.savez(tar + ".index.npz", stamp=stamp, names=np.array([Malicious()], object),
             offsets=stamp, sizes=stamp)  # fmt: skip
    assert len(tar_source(tar)) == 5


def test_errors_name_unknown_sources_and_fields(tar):
    with pytest.raises(ValueError, match="'webdatset' is unknown; known: webdataset, folder"):
        build_source({"name": "webdatset", "path": tar})
    with pytest.raises(ValueError, match=r"has no fields \['tars'\]; it has path, image"):
        build_source({"name": "webdataset", "tars": tar})
    with pytest.raises(ValueError, match="path"):
        build_source({"name": "webdataset"})


def keys_and_captions(records):
    return [
        (records[i].key.split(":")[1], records[i].captions.get("caption"))
        for i in range(len(records))
    ]


def write_members(path, members):
    """Write a tar of (name, bytes) pairs, in which a name may occur several times."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_a_repeated_key_begins_another_record(tmp_path, caplog):
    members = [("1.png", png(1)), ("1.txt", b"one"), ("2.png", png(2)), ("2.txt", b"two"),
               ("1.png", png(3)), ("1.txt", b"three")]  # fmt: skip
    records = tar_source(write_members(tmp_path / "a.tar", members))
    assert keys_and_captions(records) == [
        ("1.png", ("one",)), ("2.png", ("two",)), ("1.png", ("three",))
    ]  # fmt: skip
    assert [decode_image(records[i].image)[0, 0, 0] for i in range(3)] == [1, 2, 3]
    assert "the same key several times; 1 further records" in caplog.text


def test_members_of_one_key_are_found_under_any_spelling_and_order(tmp_path):
    members = [("./1.png", png(1)), ("d//2.png", png(2)), ("d/3.PNG", png(3)),
               ("1.txt", b"one"), ("d/2.txt", b"two"), ("./d/3.TXT", b"three")]  # fmt: skip
    records = tar_source(write_members(tmp_path / "a.tar", members))
    assert [captions for _, captions in keys_and_captions(records)] == [
        ("one",), ("two",), ("three",)
    ]  # fmt: skip


def test_the_fault_of_a_key_without_an_image_names_its_extensions(tmp_path):
    files = {"a.png": png(0), "img.v1.jpg": png(1), "img.v1.txt": b"x"}
    records = tar_source(write_tar(tmp_path / "a.tar", files))
    bad = records[1].faults["image"]
    assert bad.cause is FaultCause.MISSING_IMAGE
    assert "has the extensions v1.jpg, v1.txt, and none of the image extensions jpg" in bad.detail
    assert len(tar_source(str(tmp_path / "a.tar"), image=(".V1.JPG", "png"))) == 2


def test_a_tar_without_any_image_is_an_error_that_names_its_extensions(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"1.v1.jpg": png(1), "2.v1.jpg": png(1)})
    with pytest.raises(UserError, match=r"no images in .*: the key of 1\.v1\.jpg has the ext"):
        tar_source(path)
    assert len(tar_source(path, image="v1.jpg")) == 2


def test_labels_are_those_of_cls_members(tmp_path):
    """This is the format of CLIP_benchmark's tars."""
    files = {f"{i}.{e}": d for i, text in enumerate([b"3", b"0\n", b"cat", b"\xff", b"-1"])
             for e, d in (("webp", png(i)), ("cls", text))}  # fmt: skip
    path = write_tar(tmp_path / "a.tar", files | {"5.webp": png(5)})
    records = tar_source(path)
    labels = [records[i].label for i in range(6)]
    assert labels == [3, 0, None, None, None, None]
    assert [records[i].faults["label"].cause for i in range(2, 6)] == [
        FaultCause.MISSING_LABEL, FaultCause.BAD_UTF8,
        FaultCause.MISSING_LABEL, FaultCause.MISSING_LABEL,
    ]  # fmt: skip
    assert not records[0].faults
    assert tar_source(write_tar(tmp_path / "b.tar", {"1.png": png(1)}))[0].label is None


def test_files_with_a_byte_order_mark_are_read(tmp_path):
    text = '{"caption": "Füchsin"}'
    files = {}
    for i, encoding in enumerate(("utf-8-sig", "utf-16", "utf-32")):
        files |= {f"{i}.png": png(i), f"{i}.json": text.encode(encoding)}
        files |= {f"t{i}.png": png(i), f"t{i}.txt": "Füchsin".encode(encoding)}
    records = tar_source(write_tar(tmp_path / "a.tar", files))
    assert [c for _, c in keys_and_captions(records)] == [("Füchsin",)] * 6


def test_json_of_any_content_is_at_most_its_records_fault(tmp_path):
    contents = [b"[]", b"3", b"", b"[" * 100_000, b'{"caption": ' + b"[" * 500 + b"]" * 500 + b"}",
                b'{"caption": 1e999}', b'{"caption": NaN}', b'{"caption": {"caption": "x"}}',
                b'{"caption": "\\udc00"}', b'{"caption": ' + b"9" * 5000 + b"}",
                b'{"caption": "x", "n": ' + b"9" * 5000 + b"}"]  # fmt: skip
    files = {}
    for i, data in enumerate(contents):
        files |= {f"{i:02d}.png": png(i), f"{i:02d}.json": data}
    records = tar_source(write_tar(tmp_path / "a.tar", files))
    causes = [records[i].faults.get("captions") for i in range(len(contents))]
    assert [c and str(c.cause) for c in causes] == (
        ["bad_metadata"] * 8 + ["bad_utf8", "bad_metadata", None]
    )
    assert records[10].captions == {"caption": ("x",)}


def test_keys_of_names_that_are_not_utf8_can_be_printed(tmp_path):
    files = {"caf\udce9.png": png(1), "caf\udce9.txt": b"one"}
    records = tar_source(write_tar(tmp_path / "a.tar", files, format=tarfile.GNU_FORMAT))
    assert records[0].captions["caption"] == ("one",)
    assert records[0].key.encode("utf-8") == b"a.tar:caf\\udce9.png"


def test_hidden_folders_are_not_records(tmp_path):
    files = {n: png(1) for n in ("1.png", "__MACOSX/._1.png", "__MACOSX/2.png",
                                 "d/.ipynb_checkpoints/3.png", ".git/4.png")}  # fmt: skip
    records = tar_source(write_tar(tmp_path / "a.tar", files))
    assert [key for key, _ in keys_and_captions(records)] == ["1.png"]


def test_a_text_that_is_too_large_is_its_records_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_TEXT_BYTES", 3)
    files = {"1.png": png(1), "1.txt": b"four", "2.png": png(1), "2.txt": b"two"}
    records = tar_source(write_tar(tmp_path / "a.tar", files))
    assert records[0].faults["captions"].cause is FaultCause.UNREADABLE_FILE
    assert not records[1].faults


@pytest.mark.parametrize("name", ["{0..9}.tar", "{a,b}.tar", "a[1].tar", "a*.tar"])
def test_an_existing_file_is_not_a_pattern(tmp_path, name):
    write_tar(tmp_path / name, valid_files(3))
    for other in ("0.tar", "a.tar", "a1.tar", "ab.tar"):
        write_tar(tmp_path / other, valid_files(1))
    assert len(build_tar_source(str(tmp_path / name))) == 3


def test_pattern_with_brackets_reads_files_whose_names_have_brackets(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"a[{i}].tar", valid_files(i + 1))
    assert len(build_tar_source(str(tmp_path / "a[{0..1}].tar"))) == 3


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a{1..3}", ["a1", "a2", "a3"]),
        ("a{10..8}", ["a10", "a9", "a8"]),
        ("{09..10}", ["09", "10"]),
        ("{a}-{b,c}", ["{a}-b", "{a}-c"]),
    ],
)
def test_braces_are_expanded_as_a_shell_does(pattern, expanded):
    assert tar_index.expand_braces(pattern) == expanded
