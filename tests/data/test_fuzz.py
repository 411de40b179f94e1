"""Mutated records of every source: each is a row, good or with a counted fault.

Hypothesis draws the mutations, always the same ones (`derandomize`).
"""

import csv
import functools
import io
import itertools
import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from hypothesis import strategies as st
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from imgtune_jax.data import Pipeline, Subset, build_source, build_transform
from imgtune_jax.errors import UserError
from tests.data.conftest import encode, write_tar
from tests.data.tiny_tfds import Tiny

EXAMPLES = 24  # drawn data sets of each source
RECORDS = 12  # of a data set; all but the first are mutated
MIN_MUTATED = 2000  # over all sources
MAX_MEMORY = 400 << 20
SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.generate],  # to make a failure smaller takes minutes
    suppress_health_check=list(hypothesis.HealthCheck),
)
TRANSFORM = build_transform(
    [{"name": "resize", "size": 10, "mode": "shortest"}, {"name": "center_crop", "size": 8}]
)
CAPTION_FIELDS = {"captions": {"caption": "title"}, "label": "label", "group": "group"}


@dataclass(frozen=True)
class Draft:
    """The content of a record, before a source's writer writes it to files."""

    image: bytes
    caption: Any = "a caption"
    label: Any = 3
    group: Any = "g"


def blank_png(width, height):
    out = io.BytesIO()
    Image.new("1", (width, height)).save(out, "PNG")
    return out.getvalue()


FORMATS = [("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("TIFF", "I"), ("JPEG", "RGB"),
           ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGBA"), ("GIF", "P"), ("TIFF", "RGB"),
           ("BMP", "RGB")]  # fmt: skip
IMAGES = [encode(i, kind, (12, 10), mode) for i, (kind, mode) in enumerate(FORMATS)]
ODD_IMAGES = [b"", b"<html>404</html>", blank_png(60_000, 1), blank_png(1, 60_000),
              blank_png(12_000, 12_000), IMAGES[0] * 2]  # fmt: skip
ODD_TEXTS = ["", " ", "\ufeff", "\u2028x", "\x00", '"', '"""', 'a "b', "a,b;c|d", "²", "-1", "NaN",
             "9" * 5000, "<eos><pad>", "\ud800", "caf\udce9", "../../x", "w " * 9000]  # fmt: skip
texts = st.text(st.characters(), max_size=20) | st.sampled_from(ODD_TEXTS)
numbers = st.integers() | st.floats() | st.just(10**900) | st.booleans() | st.none()
values = st.recursive(
    texts | numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def damaged(draw, data):
    """Bytes with some of them changed, removed or inserted."""
    data, changes = bytearray(data), draw(st.integers(1, 4))
    for _ in range(changes):
        position = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from((0, 1, 1, 4, len(data))))
        data[position : position + length] = draw(st.binary(max_size=4))
    return bytes(data)


images = st.sampled_from(IMAGES).flatmap(damaged) | st.sampled_from(ODD_IMAGES) | st.binary()


@st.composite
def drafts(draw, contents):
    """A valid record, and further records with one to four mutated fields."""
    records = [Draft(IMAGES[0])]
    mutations = {"image": images, "caption": contents, "label": contents, "group": contents}
    for i in range(1, RECORDS):
        fields = draw(st.sets(st.sampled_from(sorted(mutations)), min_size=1))
        changes = {name: draw(mutations[name]) for name in sorted(fields)}
        records.append(replace(Draft(IMAGES[i % len(IMAGES)]), **changes))
    return records


def as_bytes(value):
    """Return the bytes of a text, which are not UTF-8 if it has surrogates."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


def as_metadata(draft):
    return {"title": draft.caption, "label": draft.label, "group": draft.group}


def image_names(folder, records):
    """Write the images of records to a folder, and yield (record, file name)."""
    for i, draft in enumerate(records):
        name = f"{i}-{i * 2654435761:x}.png"  # a few changed bytes are not another name
        Path(folder, name).write_bytes(draft.image)
        yield draft, name


def write_classes(folder, records, draw):
    for i, draft in enumerate(records):
        name = Path(folder, ("cat", "dog", "caf\udce9")[i % 3], f"{i}\udcff.JPG")
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(draft.image)
    return {"name": "folder", "path": folder}


def write_separated(folder, records, draw):
    # The writer puts quotes around a cell if it contains a character of `lineterminator`.
    separator, quoting, line_end = draw(
        st.sampled_from([(",", csv.QUOTE_MINIMAL, "\r\n"), (";", csv.QUOTE_ALL, "\n")])
    )
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator, quoting=quoting, lineterminator=line_end)
    writer.writerow(("filepath", "title", "label", "group"))
    for draft, name in image_names(folder, records):
        writer.writerow((name, draft.caption, draft.label, draft.group))
    return write_table(folder, "t.csv", as_bytes(out.getvalue()))


def write_tabs(folder, records, draw):
    """Write a table without quotes, in which quotes are characters."""
    lines = ["filepath\ttitle\tlabel\tgroup"]
    for draft, name in image_names(folder, records):
        cells = (name, draft.caption, draft.label, draft.group)
        lines.append("\t".join("".join(str(c).translate(NO_LINE_ENDS)) for c in cells))
    return write_table(folder, "t.tsv", as_bytes("\n".join(lines)))


NO_LINE_ENDS = {ord(c): " " for c in "\t\r\n"}


def write_json_lines(folder, records, draw):
    lines = []
    for draft, name in image_names(folder, records):
        line = json.dumps(
            {"filepath": name, **as_metadata(draft)}, ensure_ascii=draw(st.booleans())
        )
        line = line.replace("1" + "0" * 900, "1" + "0" * 9000).encode("utf-8", "surrogatepass")
        if lines and draw(st.integers(0, 3)) == 0:
            line = b"x" + draw(damaged(line)).translate(bytes.maketrans(b"\r\n", b"  "))
        lines.append(line)
    return write_table(folder, "t.jsonl", b"\n".join(lines))


def write_json_list(folder, records, draw):
    rows = [{"filepath": name, **as_metadata(d)} for d, name in image_names(folder, records)]
    rows[1:] = [draw(st.just(row) | values) if draw(st.booleans()) else row for row in rows[1:]]
    return write_table(folder, "t.json", json.dumps(rows).encode())


def write_table(folder, name, data):
    Path(folder, name).write_bytes(data)
    return {"name": "folder", "path": folder, "table": str(Path(folder, name)), **CAPTION_FIELDS}


def write_text_tar(folder, records, draw):
    files = {}
    for i, draft in enumerate(records):
        key = f"d/{i}" if draw(st.booleans()) else f"./d/{i}\udce9"
        members = [("png", draft.image), ("txt", as_bytes(draft.caption)),
                   ("cls", as_bytes(draft.label))]  # fmt: skip
        kept = draw(st.integers(0 if i else 3, 3)) or 1
        files |= {f"{key}.{extension}": data for extension, data in members[:kept]}
    return {"name": "webdataset", "path": write_tar(Path(folder, "a.tar"), files)}


def write_json_tar(folder, records, draw):
    files = {}
    for i, draft in enumerate(records):
        metadata = json.dumps(as_metadata(draft)).encode()
        files[f"{i}.json"] = draw(damaged(metadata)) if i and draw(st.booleans()) else metadata
        if not i or draw(st.integers(0, 4)):
            files[f"{i}.png"] = draft.image
    path = write_tar(Path(folder, "b.tar"), files)
    return {"name": "webdataset", "path": path, **CAPTION_FIELDS}


def write_mixture(folder, records, draw):
    half = len(records) // 2
    tar = write_json_tar(folder, records[:half], draw)
    return {"name": "mixture", "sources": [tar, write_json_lines(folder, records[half:], draw)]}


@functools.cache
def tiny_data_set():
    """Return the folder of a TFDS data set, its file of records, and its first record."""
    folder = tempfile.mkdtemp()
    Tiny(data_dir=folder, file_format="array_record").download_and_prepare()
    (file,) = Path(folder).rglob("*array_record*")
    return folder, file, ArrayRecordReader(str(file)).read([0])[0]


def write_tfds(folder, records, draw):
    """Write a copy of a TFDS data set, with these records in place of its own."""
    original, file, serialized = tiny_data_set()
    shutil.copytree(original, folder, dirs_exist_ok=True)
    (info,) = Path(folder).rglob("dataset_info.json")
    splits = json.loads(info.read_text())
    splits["splits"][0]["shardLengths"] = [str(len(records))]
    info.write_text(json.dumps(splits))
    writer = ArrayRecordWriter(str(Path(folder, file.relative_to(original))), "group_size:1")
    for i, draft in enumerate(records):
        example = tf_example_pb2.Example.FromString(serialized)
        features = example.features.feature
        features["image"].bytes_list.value[:] = [draft.image]
        features["title"].bytes_list.value[:] = [as_bytes(draft.caption)]
        if isinstance(draft.label, int) and abs(draft.label) < 2**63:
            features["label"].int64_list.value[:] = [int(draft.label)]
        elif isinstance(draft.label, list):
            features["label"].int64_list.value[:] = [3] * len(draft.label)
        data = example.SerializeToString()
        writer.write(draw(damaged(data)) if i and draw(st.booleans()) else data)
    writer.close()
    return {"name": "tfds", "dataset": "tiny", "data_dir": folder, "label": ("label",),
            "captions": {"caption": ("title",)}, "group": ("label",)}  # fmt: skip


WRITERS = {
    "classes": write_classes,
    "csv": write_separated,
    "tsv": write_tabs,
    "jsonl": write_json_lines,
    "json": write_json_list,
    "text tar": write_text_tar,
    "json tar": write_json_tar,
    "tfds": write_tfds,
    "mixture": write_mixture,
}
FILES = {"csv": "t.csv", "tsv": "t.tsv", "jsonl": "t.jsonl", "json": "t.json",
         "text tar": "a.tar", "json tar": "b.tar", "tfds": "*array_record*"}  # fmt: skip
TEXT_ONLY = ("csv", "tsv", "classes")  # sources whose values are texts


def check_rows(source, tokenizer):
    """Assert that each record is one row, good or with a counted fault. Return if 0 is good."""
    n = len(source)
    pipeline = Pipeline(
        source=source, transform=TRANSFORM, tokenizer=tokenizer, batch_size=n, shuffle=True,
        caption_weights=dict.fromkeys(getattr(source, "caption_sets", ("caption",)), 1.0),
        num_threads=1, prefetch=1, max_bad_fraction=1.0, max_pixels=1 << 20,
    )  # fmt: skip
    epoch = next(itertools.islice(pipeline.batches(), 1))
    counts = pipeline.bad_records()
    good = epoch["example_mask"]
    assert sorted(epoch["index"].tolist()) == list(range(n))
    assert counts.pop("seen") == n and sum(counts.values()) == n - good.sum()
    assert epoch["image"].shape == (n, 8, 8, 3) and epoch["image"].dtype == np.uint8
    assert not epoch["image"][~good].any() and not epoch["text_mask"][~good].any()
    assert ((epoch["text"] >= 0) & (epoch["text"] < tokenizer.vocab_size)).all()
    assert epoch["text_mask"][good].any(1).all()
    for i in range(n):
        record = source[i]
        assert record.key.encode() and (record.label is None or 0 <= record.label < 2**31)
        assert all(bad.detail.encode() for bad in record.faults.values())
    assert source.fingerprint == source.fingerprint
    return good[epoch["index"] == 0].all()


pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
              pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]  # fmt: skip


@pytest.fixture(autouse=True)
def limited_memory():
    """Assert that a test's peak of resident memory is at most MAX_MEMORY above its beginning."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to the present size
    before = peak_memory()
    yield
    assert peak_memory() - before < MAX_MEMORY


def peak_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def fuzz(draw_and_check):
    """Run a check with each of the data sets that Hypothesis draws, in an empty folder."""

    @SETTINGS
    @hypothesis.given(st.data())
    def run(data):
        with tempfile.TemporaryDirectory() as folder:
            draw_and_check(folder, data.draw)

    run()


@pytest.mark.parametrize("name", WRITERS)
def test_every_mutated_record_is_a_good_row_or_a_counted_fault(name, tokenizer):
    mutated = 0

    def check(folder, draw):
        nonlocal mutated
        records = draw(drafts(texts if name in TEXT_ONLY else values))
        source = build_source(WRITERS[name](folder, records, draw))
        assert len(source) == RECORDS
        assert check_rows(source, tokenizer) or name == "classes"  # whose order is another
        if name == "mixture":
            check_rows(Subset(source, tuple(range(0, RECORDS, 2))), tokenizer)
        mutated += RECORDS - 1

    fuzz(check)
    assert mutated >= MIN_MUTATED / len(WRITERS)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_or_read(name, tokenizer):
    """A table, a tar or an ArrayRecord file with damaged bytes, also in its structure."""

    def check(folder, draw):
        records = draw(st.permutations([Draft(image) for image in IMAGES]))
        config = WRITERS[name](folder, records, draw)
        path = next(Path(folder).rglob(FILES[name]))
        path.write_bytes(draw(damaged(path.read_bytes())))
        try:
            source = build_source(config)
        except UserError:
            return
        check_rows(source, tokenizer)

    fuzz(check)
