"""Prompt templates: class names, braces and errors."""

import pytest

from imgtune_jax.errors import UserError
from imgtune_jax.evals import zeroshot
from imgtune_jax.evals.templates import TEMPLATES, fill_template


@pytest.mark.parametrize("name", ["cat", "{}", "{c", "a {{b}} c"])
@pytest.mark.parametrize("template", [t for group in TEMPLATES.values() for t in group[:3]])
def test_class_name_is_inserted_as_it_is(template, name):
    before, after = template.split("{}")
    assert fill_template(template, name) == before + name + after


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{c} and {}", "cat and cat"),
        ("{} {}", "cat cat"),
        ("{0}", "cat"),
        ("a {{set}} of {}", "a {set} of cat"),
    ],
)
def test_each_placeholder_is_the_name_and_double_braces_are_braces(template, prompt):
    assert fill_template(template, "cat") == prompt


@pytest.mark.parametrize(
    "template",
    ["a photo", "a {{}} photo", "{name}", "{", "}", "a {} {", "{:>9}", "{!r}", "{c.x}", "{1}", ""],
)
def test_template_without_the_name_or_with_other_braces_is_refused(template):
    with pytest.raises(UserError, match=r"expected \{\} or \{c\} for the class name"):
        fill_template(template, "a photo")


def test_one_string_is_no_list_of_templates():
    for templates in ("a photo of a {}", {"cat": "a photo of a cat"}):
        with pytest.raises(UserError, match="one string; expected a list"):
            zeroshot.class_prompts("cat", templates)
