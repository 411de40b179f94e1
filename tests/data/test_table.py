"""Tables in every format that users write are read as they mean it, or refused by name."""

import json

import pytest

from imgtune_jax.data import FaultCause
from imgtune_jax.data.table import read_table
from imgtune_jax.errors import UserError

COLUMNS = ("filepath", "title")
EXPECTED = [("a.jpg", "eine Füchsin"), ("b.jpg", "b")]
OBJECTS = [dict(zip(COLUMNS, row, strict=True)) for row in EXPECTED]
CSV = "filepath,title\na.jpg,eine Füchsin\nb.jpg,b\n"


def cells(path, data, columns=COLUMNS):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    rows = read_table(path, columns=columns)
    assert not [row.fault for row in rows if row.fault]
    return [tuple(row.cells[column] for column in columns) for row in rows]


@pytest.mark.parametrize(
    "name, data",
    {
        "comma.csv": CSV,
        "tab.csv": CSV.replace(",", "\t"),
        "comma.tsv": CSV,
        "semicolon.csv": CSV.replace(",", ";"),
        "bar.tsv": CSV.replace(",", "|"),
        "upper.CSV": CSV,
        "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
        "utf16.csv": CSV.encode("utf-16"),
        "utf16be.csv": b"\xfe\xff" + CSV.encode("utf-16-be"),
        "utf32.csv": CSV.encode("utf-32"),
        "cr.csv": CSV.replace("\n", "\r"),
        "crlf.csv": CSV.replace("\n", "\r\n"),
        "no_end.csv": CSV.rstrip("\n"),
        "blank_lines.csv": "\n" + CSV.replace("\n", "\n\n") + ",\n",
        "header_spaces.csv": CSV.replace("filepath,title", " filepath , title "),
        "cell_spaces.csv": CSV.replace(",", ", ").replace("eine Füchsin", '"eine Füchsin"'),
        "quoted.csv": '"filepath","title"\n"a.jpg","eine Füchsin"\n"b.jpg","b"\n',
        "more_columns.csv": ",title,filepath,url\n0,eine Füchsin,a.jpg,x\n1,b,b.jpg,\n",
        "empty_cells.csv": "filepath,title,\na.jpg,eine Füchsin,,\nb.jpg,b,,\n",
        "lines.jsonl": '{"filepath": "a.jpg", "title": "eine F\\u00fcchsin"}\n\n'
        '{"filepath": "b.jpg", "title": "b"}',
        "cr.jsonl": '{"filepath": "a.jpg", "title": "eine Füchsin"}\r'
        '{"filepath": "b.jpg", "title": "b"}\r',
        "bom.jsonl": b"\xef\xbb\xbf"
        + '{"filepath":"a.jpg","title":"eine Füchsin"}\n{"filepath":"b.jpg","title":"b"}'.encode(),
        "list.json": json.dumps(OBJECTS, indent=1),
        "lines.json": "\n".join(map(json.dumps, OBJECTS)),
        "list.JSON": b"\xef\xbb\xbf" + json.dumps(OBJECTS).encode(),
    }.items(),
)  # fmt: skip
def test_formats_that_users_write_are_read_alike(tmp_path, name, data):
    assert cells(tmp_path / name, data) == EXPECTED


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.csv", "", "is empty"),
        ("a.jsonl", "\n \n", "is empty"),
        ("a.csv", "filepath,title\n", "no rows after its header"),
        ("a.csv", "image,caption\na.jpg,x\n",
         r"no columns \['filepath', 'title'\]; it has \['image', 'caption'\]"),
        ("a.csv", "a.jpg\tx\nb.jpg\ty\n", r"it has \['a.jpg', 'x'\]"),
        ("a.csv", "filepath,Title\na.jpg,x\n",
         r"no columns \['title'\]; it has \['filepath', 'Title'\]"),
        ("a.csv", "filepath,title,title\na.jpg,x,y\n", r"several columns \['title'\]"),
        ("a.jsonl", '{"image": "a.jpg"}\n', r"'title'\]; it has \['image'\]"),
        ("a.jsonl", "a.jpg x\n", "no JSON objects .*a.jsonl line 1 is not JSON"),
        ("a.json", "[]", "no JSON objects"),
        ("a.json", "[{]", "is not JSON"),
        ("a.json", "[" * 100_000, "too deeply nested"),
        ("a.json", '{"images": [], "annotations": []}', r"it has \['images', 'annotations'\]"),
        ("a.csv", CSV.encode("utf-16-le"), "save it as UTF-8"),
        ("a.csv", CSV.encode("utf-16")[:-1], "save it as UTF-8"),
        ("a.parquet", CSV, r"expected a \.csv, \.tsv, \.jsonl, \.json file"),
    ],
)  # fmt: skip
def test_other_tables_are_refused_by_name(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message) as caught:
        cells(tmp_path / name, data)
    assert name in str(caught.value)


@pytest.mark.parametrize("separator", ["\t", ","])
def test_unbalanced_quotes_lose_no_line(tmp_path, separator):
    titles = ['"open', "b", '12" ruler', '"quoted" and more', 'said "so"', '"', "h", '"last']
    lines = [f"{i}.jpg{separator}{title}" for i, title in enumerate(titles)]
    table = "\n".join([separator.join(COLUMNS), *lines]) + "\n"
    assert cells(tmp_path / "a.tsv", table) == [(f"{i}.jpg", t) for i, t in enumerate(titles)]


def test_a_quoted_cell_that_contains_whole_rows_is_unbalanced_in_a_table_with_tabs(tmp_path):
    """A strict reader accepts this: the quote of row 0 is closed at the end of row 2."""
    table = 'filepath\ttitle\n0.jpg\t"a\n1.jpg\tb\n2.jpg\tc"\n'
    assert cells(tmp_path / "a.tsv", table) == [("0.jpg", '"a'), ("1.jpg", "b"), ("2.jpg", 'c"')]


@pytest.mark.parametrize("separator", ["\t", ","])
def test_balanced_quotes_are_those_of_csv(tmp_path, separator):
    titles = ["two\nlines", 'a "word"', f"one{separator}two", "a\r\n\r\nb\nc"]
    quoted = ['"' + title.replace('"', '""') + '"' for title in titles]
    lines = [f"{i}.jpg{separator}{title}" for i, title in enumerate(quoted)]
    table = "\n".join([separator.join(COLUMNS), *lines]) + "\n"
    assert cells(tmp_path / "a.csv", table) == [(f"{i}.jpg", t) for i, t in enumerate(titles)]


def test_a_field_may_have_any_length(tmp_path):
    long = "word " * 100_000
    assert cells(tmp_path / "a.csv", f"filepath,title\na.jpg,{long}\n") == [("a.jpg", long)]


def test_a_row_with_more_cells_than_the_header_is_a_fault(tmp_path):
    """The caption "red, white and blue" would otherwise be read as "red"."""
    (tmp_path / "a.csv").write_text("filepath,title\na.jpg,red, white and blue\nb.jpg,b\nc.jpg\n")
    faulty, good, short = read_table(tmp_path / "a.csv", columns=COLUMNS)
    assert faulty.fault.cause is FaultCause.BAD_METADATA
    assert "a.csv line 2 has 3 cells, but the header has 2" in faulty.fault.detail
    assert good.fault is short.fault is None and short.cells == {"filepath": "c.jpg"}


def test_lines_are_counted_from_1_and_include_the_header_and_blank_lines(tmp_path):
    (tmp_path / "a.csv").write_text('filepath,title\na.jpg,"two\nlines"\n\nb.jpg,b\n')
    names = [row.name for row in read_table(tmp_path / "a.csv", columns=COLUMNS)]
    assert names == ["a.csv line 2", "a.csv line 5"]
    (tmp_path / "a.jsonl").write_text('{"filepath": "", "title": ""}\n\n[1]\n')
    rows = read_table(tmp_path / "a.jsonl", columns=COLUMNS)
    assert [row.name for row in rows] == ["a.jsonl line 1", "a.jsonl line 3"]
    assert "a.jsonl line 3 = [1]; expected a JSON object" in rows[1].fault.detail


def test_a_value_that_is_no_object_is_one_rows_fault(tmp_path):
    deep = "[" * 500 + "]" * 500
    data = f'[{{"filepath": "a.jpg", "title": {"9" * 5000}}}, 3, {{"filepath": {deep}}}]'
    (tmp_path / "a.json").write_text(data)
    rows = read_table(tmp_path / "a.json", columns=COLUMNS)
    assert rows[0].fault is None and rows[0].cells["title"] == float("inf")
    assert [row.name for row in rows if row.fault] == ["a.json item 2", "a.json item 3"]
