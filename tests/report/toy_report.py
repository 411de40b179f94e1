"""Toy retrieval data and an HTML parser for the tests of the report."""

from __future__ import annotations

import dataclasses
import html.parser
import io

import numpy as np
from PIL import Image

from imgtune_jax.report import RetrievalData

UNSAFE = "<script>alert(\"x\")</script> & 'quotes' {{ 7 * 7 }}"


def png(color) -> bytes:
    """Return a small PNG file of one color."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def retrieval_data(**changes) -> RetrievalData:
    """Return three images with one caption each; caption 2 is closest to image 0."""
    eye = np.eye(3, dtype=np.float32)
    data = RetrievalData(
        dataset="toy",
        thumbnails=[png(c) for c in ("red", "green", "blue")],
        captions=["red", "green", UNSAFE],
        image_emb=eye,
        text_emb=np.stack([eye[0], eye[1], [0.9, 0.1, 0.2]]).astype(np.float32),
        image_of_text=np.arange(3),
    )
    return dataclasses.replace(data, **changes)


class Page(html.parser.HTMLParser):
    """Parses a page into `tags`, with their attributes, and `words`, the text outside <style>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self._open = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "style":
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag == "style":
            self._open.pop()

    def handle_data(self, data):
        if not self._open:
            self.words += data
