"""Files that are not weights are called what they are, and not damaged copies."""

import pytest

from imgtune_jax import interop
from imgtune_jax.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "Git LFS pointer to a file of 90868376 bytes"),
        (b"\n<!DOCTYPE html>\n<html><title>404", "HTML or XML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied', "HTML or XML page"),
        (b"GGUF\3\0\0\0", "GGUF file"),
        (b"\x89HDF\r\n\x1a\n\0\0\0\0\0", "HDF5 file"),
        (b'{"error": "Repository not found"}', "JSON text"),
    ],
    ids=["lfs", "html", "xml", "gguf", "hdf5", "json"],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".npz"])
def test_file_that_is_not_weights_is_named(content, message, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        interop.read_state_dict(path)
    assert path.name in str(error.value)
    assert "original has another size" not in str(error.value)
