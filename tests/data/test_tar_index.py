"""Every kind of member that tar programs write is read right, or named as unreadable."""

import io
import logging
import tarfile
from pathlib import Path

import pytest

from imgtune_jax.data import BadRecord, FaultCause, tar_index
from imgtune_jax.errors import UserError
from tests.data.conftest import write_tar

LIMIT = 1 << 20


def add(tar, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def contents(path):
    """Return {name: bytes} of the members of a tar, with a cause in place of unreadable bytes."""
    index = tar_index.index_tar(path)
    found = {}
    for i, name in enumerate(index.names):
        try:
            found[name] = index.read(i, max_bytes=LIMIT)
        except BadRecord as bad:
            found[name] = bad.cause
    return found


def test_a_hard_link_has_the_bytes_of_its_target(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", b"one")
        add(tar, "2.png", type=tarfile.LNKTYPE, linkname="1.png")
        add(tar, "1.png", b"newer")
        add(tar, "3.png", type=tarfile.LNKTYPE, linkname="2.png")
        add(tar, "4.png", type=tarfile.LNKTYPE, linkname="1.png")
        add(tar, "5.png", type=tarfile.LNKTYPE, linkname="6.png")
        add(tar, "6.png", b"six")
    assert contents(tmp_path / "a.tar") == {
        "1.png": b"newer", "2.png": b"one", "3.png": b"one", "4.png": b"newer",
        "5.png": FaultCause.UNREADABLE_FILE, "6.png": b"six",
    }  # fmt: skip


def test_a_sparse_member_is_unreadable(tmp_path):
    """Its bytes in the tar are not those of the file."""
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "2.png",
           "GNU.sparse.realsize": "9000"}  # fmt: skip
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "1.png", b"one")
        add(tar, "2.png", b"1\n0\n3\n".ljust(512, b"\0") + b"two", pax_headers=pax)
        add(tar, "3.png", b"three")
    assert contents(tmp_path / "a.tar") == {
        "1.png": b"one", "2.png": FaultCause.UNREADABLE_FILE, "3.png": b"three"
    }  # fmt: skip


def test_links_and_devices_are_named_in_a_warning(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "folder.png", type=tarfile.DIRTYPE)
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="1.png")
        add(tar, "fifo.png", type=tarfile.FIFOTYPE)
        add(tar, "1.png", b"one")
    assert contents(tmp_path / "a.tar") == {"1.png": b"one"}
    assert "2 symbolic links or devices are not used: link.png, fifo.png" in caplog.text


def test_names_that_are_not_utf8_are_kept_also_in_the_cached_index(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "CACHE_MIN_BYTES", 0)
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        add(tar, "café.png", b"one")
    for _ in range(2):
        assert contents(tmp_path / "a.tar") == {"caf\udce9.png": b"one"}
    assert (tmp_path / "a.tar.index.npz").is_file()


def test_an_empty_cached_index_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "CACHE_MIN_BYTES", 0)
    write_tar(tmp_path / "a.tar", {"1.png": b"one"})
    (tmp_path / "a.tar.index.npz").write_bytes(b"")
    assert contents(tmp_path / "a.tar") == {"1.png": b"one"}
    assert (tmp_path / "a.tar.index.npz").stat().st_size


def test_members_after_a_damaged_header_are_found(tmp_path, caplog):
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.png": b"%d" % i for i in range(4)})
    data = bytearray(path.read_bytes())
    data[1024:1034] = b"\xff" * 10  # in the name of 1.png, so that its checksum is wrong
    path.write_bytes(data)
    assert contents(path) == {"0.png": b"0", "2.png": b"2", "3.png": b"3"}
    assert "a.tar is damaged: the bytes 1024 to 2048 are no member" in caplog.text


def test_members_after_a_malformed_pax_header_are_found(tmp_path, caplog):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "0.png", b"0")
        add(tar, "1.png", b"1", pax_headers={"GNU.sparse.size": "y"})
        add(tar, "2.png", b"2")
    found = contents(path)
    assert found["0.png"] == b"0" and found["2.png"] == b"2"
    assert "is damaged" in caplog.text


def test_members_of_concatenated_tars_are_all_read(tmp_path, caplog):
    parts = [Path(write_tar(tmp_path / f"{i}.tar", {f"{i}.png": b"%d" % i})) for i in range(3)]
    data = b"".join(part.read_bytes() for part in parts)
    (tmp_path / "all.tar").write_bytes(data)
    assert contents(tmp_path / "all.tar") == {"0.png": b"0", "1.png": b"1", "2.png": b"2"}
    assert not caplog.messages


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12])
def test_a_size_beyond_the_end_is_one_members_fault_and_allocates_nothing(tmp_path, size, caplog):
    path = tmp_path / "a.tar"
    write_tar(path, {"0.png": b"0", "1.png": b"1"})
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = size
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found = contents(path)
    assert found.pop("0.png") == b"0" and caplog.messages
    assert set(found.values()) <= {FaultCause.UNREADABLE_FILE}


@pytest.mark.parametrize("data", [b"", b"x", b"\x1f\x8b" + bytes(2000), b"x" * 5000])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar is not an uncompressed tar"):
        tar_index.index_tar(tmp_path / "a.tar")
