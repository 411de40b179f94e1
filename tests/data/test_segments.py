"""Damaged segments are dropped and written again; failed and dead writers leave no files."""

import errno
import logging
import os
import socket
import subprocess
import time

import numpy as np
import pytest

from imgtune_jax.data import segments
from imgtune_jax.errors import DiskFullError, UserError
from tests.data.test_feature_store import open_store, random_rows


def fill(store, ids, seed=0):
    """Write the rows `ids` of the first view as one segment; return what `read` will return."""
    written = store.write(
        np.zeros(len(ids), int), ids, random_rows(len(ids), seed), np.ones(len(ids), bool)
    )
    store.flush()
    return written


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save_ids(path, ids):
    np.savez(path.open("wb"), ids=np.array(ids), broken=np.zeros(len(ids), bool), seconds=0.0)


DAMAGES = {
    "truncated rows": lambda rows, ids: truncate(rows),
    "empty rows": lambda rows, ids: rows.write_bytes(b""),
    "missing rows": lambda rows, ids: rows.unlink(),
    "truncated ids": lambda rows, ids: truncate(ids),
    "empty ids": lambda rows, ids: ids.write_bytes(b""),
    "ids that are no npz": lambda rows, ids: ids.write_text("none"),
    "fewer ids than rows": lambda rows, ids: save_ids(ids, [0, 1]),
    "ids of no record": lambda rows, ids: save_ids(ids, [0, 1, 2, 99]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_segment_is_named_dropped_and_written_again(tmp_path, caplog, damage):
    store = open_store(tmp_path)
    fill(store, np.arange(4))
    (damaged,) = tmp_path.glob("*.ids.npz")
    rows = damaged.with_name(damaged.name.replace(".ids.npz", ".array_record"))
    intact = fill(store, np.arange(4, 10), seed=1)
    damage(rows, damaged)
    with caplog.at_level(logging.WARNING, "imgtune_jax.data"):
        reopened = open_store(tmp_path)
    assert rows.name in caplog.text or damaged.name in caplog.text
    assert reopened.first_missing == 0 and reopened.num_rows == 6
    read, _ = reopened.read(np.zeros(6, int), np.arange(4, 10))
    np.testing.assert_array_equal(read, intact)
    assert not damaged.exists() and not rows.exists()
    again = fill(reopened, np.arange(4))
    assert open_store(tmp_path).complete_views()[0]
    np.testing.assert_array_equal(reopened.read(np.zeros(4, int), np.arange(4))[0], again)


def test_store_can_be_loaded_for_reading_without_removing_files(tmp_path):
    store = open_store(tmp_path)
    fill(store, np.arange(4))
    (rows,) = tmp_path.glob("*.array_record")
    truncate(rows)
    files = sorted(tmp_path.iterdir())
    assert type(store).load(tmp_path).num_rows == 0
    assert sorted(tmp_path.iterdir()) == files


def test_changed_bytes_within_a_segment_are_an_error_that_names_it(tmp_path):
    store = open_store(tmp_path)
    fill(store, np.arange(10))
    (rows,) = tmp_path.glob("*.array_record")
    data = bytearray(rows.read_bytes())
    row = random_rows(10)[3].tobytes()
    position = data.index(row)
    data[position : position + 8] = bytes(8)
    rows.write_bytes(data)
    with pytest.raises(UserError, match=f"{rows.name} is damaged: .*; its rows are then computed"):
        open_store(tmp_path).read(np.zeros(10, int), np.arange(10))


@pytest.mark.parametrize("content", ["", "{", "[]", None], ids=["empty", "cut", "list", "absent"])
def test_segments_without_a_readable_manifest_are_dropped(tmp_path, caplog, content):
    """Their key is unknown, so they may be features of other weights."""
    fill(open_store(tmp_path), np.arange(10))
    manifest = tmp_path / "manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    reopened = open_store(tmp_path)
    assert reopened.first_missing == 0 and "removing the segment" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.fixture(scope="module")
def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("suffix", [".tmp", ".array_record"])
def test_incomplete_files_of_dead_writers_are_removed(tmp_path, caplog, dead_pid, suffix):
    here, day = socket.gethostname(), 24 * 3600
    ages = {  # {writer: age in seconds}
        f"{dead_pid}-{here}": 0,
        f"{os.getppid()}-{here}": 0,
        f"{os.getpid()}-{here}": 0,
        f"{os.getpid()}-{here}-restarted": day // 2,
        f"{dead_pid}-another-host": 0,
        f"{dead_pid}-yet-another-host": 2 * day,
    }
    open_store(tmp_path)
    for writer, age in ages.items():
        path = tmp_path / f"0123-{writer.removesuffix('-restarted')}{suffix}"
        if writer.endswith("-restarted"):  # a process with this process's id, before it began
            path = path.with_name(path.name.replace("0123", "4567"))
        path.write_bytes(b"incomplete")
        os.utime(path, (time.time() - age,) * 2)
    open_store(tmp_path)
    left = {p.name for p in tmp_path.iterdir()} - {"manifest.json"}
    running = (f"{os.getppid()}-{here}", f"{os.getpid()}-{here}", f"{dead_pid}-another-host")
    assert left == {f"0123-{writer}{suffix}" for writer in running}
    assert f"0123-{dead_pid}-{here}{suffix}, which an earlier process left" in caplog.text


def test_files_of_a_running_writer_have_its_process_in_their_names(tmp_path):
    fill(open_store(tmp_path), np.arange(4))
    names = {p.name for p in tmp_path.iterdir()} - {"manifest.json"}
    assert len(names) == 2
    assert all(f"-{os.getpid()}-{socket.gethostname()}." in name for name in names)


@pytest.mark.parametrize("function", ["_write_rows", "_write_ids"])
def test_full_disk_leaves_no_file_and_states_bytes(tmp_path, monkeypatch, function):
    def write_and_fail(path, *args):
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    store = open_store(tmp_path)
    monkeypatch.setattr(segments, function, write_and_fail)
    message = rf"a segment of 4 cached rows, 131,072 bytes, cannot be written to {tmp_path}, "
    with pytest.raises(DiskFullError, match=message + r"which has [\d,]+ bytes free"):
        fill(store, np.arange(4))
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_row_that_is_not_finite_is_never_stored(tmp_path, dtype, value):
    store = open_store(tmp_path, dtype)
    values = random_rows(3)
    values[1, 2, 5] = value
    message = r"the features of 1 of 3 records are NaN or infinite \(such as record 7\)"
    with pytest.raises(UserError, match=message):
        store.write(np.zeros(3, int), np.array([4, 7, 8]), values, np.ones(3, bool))
    store.flush()
    assert store.num_rows == 0


def test_number_that_bfloat16_rounds_to_infinity_is_never_stored(tmp_path):
    values = np.full((1, 3, 8), np.finfo(np.float32).max)
    with pytest.raises(UserError, match="that bfloat16"):
        open_store(tmp_path, "bfloat16").write(
            np.zeros(1, int), np.zeros(1, int), values, np.ones(1, bool)
        )
