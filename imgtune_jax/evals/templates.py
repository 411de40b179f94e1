"""Prompt templates for zero-shot classification; `{}` or `{c}` is replaced by the class name.

The two lists of ImageNet prompts and the class names are OpenAI's (github.com/openai/CLIP, MIT,
Copyright (c) 2021 OpenAI). They are copied from open_clip 3.3.0 (MIT); see LICENSE.prompts.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from importlib import resources

from imgtune_jax.errors import UserError

OPENAI_IMAGENET = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

# The seven prompts of OPENAI_IMAGENET that work best as an ensemble, according to OpenAI.
SIMPLE_IMAGENET = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

TEMPLATES: dict[str, tuple[str, ...]] = {
    "openai_imagenet": OPENAI_IMAGENET,
    "simple_imagenet": SIMPLE_IMAGENET,
    "photo": ("a photo of a {}.",),
    "name": ("{}",),
}


def fill_template(template: str, name: str) -> str:
    """Return a template with each `{}` or `{c}` replaced by the class name.

    `{{` and `}}` stand for braces. Raises UserError for a template without a class name, and for
    any other use of braces.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}; {_TEMPLATE_RULE}") from error
    fields = [part[1:] for part in parts if part[1] is not None]
    if not fields or any(field not in _NAME_FIELDS for field in fields):
        raise UserError(f"template = {template!r}; {_TEMPLATE_RULE}")
    return "".join(text + ("" if field is None else name) for text, field, *_ in parts)


_NAME_FIELDS = [(field, "", None) for field in ("", "0", "c")]  # (name, format, conversion)
_TEMPLATE_RULE = "expected {} or {c} for the class name, and {{ or }} for a brace"


def imagenet_classnames() -> tuple[str, ...]:
    """Return OpenAI's 1000 names of the ImageNet-1k classes, in the order of the labels."""
    text = (
        resources.files("imgtune_jax.evals").joinpath("imagenet_classnames.txt").read_text("utf-8")
    )
    return tuple(text.removesuffix("\n").split("\n"))


CLASSNAMES: dict[str, Callable[[], tuple[str, ...]]] = {"imagenet": imagenet_classnames}
