import json

import pytest

from imgtune_jax.json_lines import read_json_lines


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path, separator):
    records = [{"text": f"a{separator}b"}, {"text": "c"}]
    # A control character below U+0020 must be escaped in JSON, the others may be written as such.
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (tmp_path / "x.jsonl").write_text("".join(lines), "utf-8")
    assert read_json_lines(tmp_path / "x.jsonl") == records


def test_blank_lines_and_an_incomplete_last_line_are_skipped(tmp_path):
    path = tmp_path / "x.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"step": 1}\n\n{"step": 2}\r\n{"step": 3, "lo')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}')
    assert read_json_lines(path) == [{"step": 1}]


@pytest.mark.parametrize("line, message", [("{", "is not JSON"), ("[1]", "expected a JSON object")])
def test_any_other_line_that_is_not_an_object_raises(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 2 .*{message}"):
        read_json_lines(path)
