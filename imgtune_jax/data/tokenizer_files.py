"""Loading of tokenizers from local files, in the formats of this project and of others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers

from imgtune_jax.data import clip_bpe
from imgtune_jax.data.tokenizer import CLEANINGS, SETTINGS_FILE, Tokenizer
from imgtune_jax.errors import UserError
from imgtune_jax.package_files import package_file
from imgtune_jax.paths import user_path

TOKENIZER_CONFIG = "tokenizer_config.json"  # of Hugging Face's tokenizers
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")


def load_tokenizer(path: str | Path, **settings: Any) -> Tokenizer:
    """Load a tokenizer from a local folder or file; nothing is downloaded.

    `path` is a folder with `tokenizer.json`, a folder that `transformers` can read (`spiece.model`,
    …), a `tokenizer.json`, or CLIP's `bpe_simple_vocab_16e6.txt.gz`. `settings` are `length`,
    `pad_id` and `cleaning`. Their defaults are those saved in the folder or, for CLIP's file,
    length 77, pad_id 0 and cleaning "clip". Raises UserError if there is no tokenizer at the path,
    or if `settings` differ from the saved ones.
    """
    path = user_path(path)
    settings = {k: v for k, v in settings.items() if v is not None}
    if path.name.endswith(".txt.gz") and path.is_file():
        defaults = {"length": clip_bpe.LENGTH, "pad_id": 0, "cleaning": "clip"}
        return Tokenizer(clip_bpe.build_clip_tokenizer(path), **(defaults | settings))
    backend, folder = _load_backend(path)
    settings_file = folder / SETTINGS_FILE
    saved = json.loads(settings_file.read_text("utf-8")) if settings_file.is_file() else {}
    changed = {k: (saved[k], v) for k, v in settings.items() if k in saved and saved[k] != v}
    if changed:
        raise UserError(
            f"the tokenizer in {folder} was saved with other settings: (saved, got) = {changed}; "
            "weights trained with this tokenizer need the saved settings, so do not set these"
        )
    settings = saved | settings
    if "length" not in settings:
        raise UserError(
            f"the length of the tokenizer {path} is not set; set it to the number of tokens that "
            "texts are padded or truncated to, such as 64"
        )
    if "pad_id" not in settings:
        settings["pad_id"] = _find_pad_id(backend, folder)
    tokenizer = Tokenizer(backend, **settings)
    _check_lower_case(tokenizer, folder)
    return tokenizer


def _with_begin_token(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """Return a tokenizer that also puts `token` before each text.

    Raises UserError if there is no such token, or if the tokenizer adds another begin token.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    begin_id = backend.token_to_id(token)
    if tokenizer.bos_ids == (begin_id,):  # as in the copy that a run saves
        return tokenizer
    if begin_id is None or tokenizer.bos_ids:
        own = [backend.id_to_token(i) for i in tokenizer.bos_ids]
        raise UserError(
            f"begin_token = {token!r}; expected a token of a tokenizer that adds no begin token "
            f"itself, but this one {f'adds {own}' if own else 'has no such token'}; set "
            "begin_token to None, or to a token of the tokenizer"
        )
    pieces = [token, "$A", *(backend.id_to_token(i) for i in tokenizer.eos_ids)]
    ids = {piece: backend.token_to_id(piece) for piece in pieces if piece != "$A"}
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=pieces, special_tokens=list(ids.items())
    )
    return replace(tokenizer, backend=backend)


def build_tokenizer(config: Mapping[str, Any]) -> Tokenizer:
    """Build a tokenizer from `{"path": …, "length": 64}` or `{"package": …, "length": 64}`.

    With `package`, the name of an installed pip package, the tokenizer is the only file of that
    package that matches the glob `path` (by default "*tokenizer.json"). Other keys are the settings
    of `load_tokenizer`. `begin_token` is put before every text, for a decoder whose tokenizer adds
    no begin token; T5's decoders begin with "<pad>".
    """
    settings = dict(config)
    package, path = settings.pop("package", None), settings.pop("path", None)
    begin_token = settings.pop("begin_token", None)
    known = ("length", "pad_id", "cleaning")
    if unknown := set(settings) - set(known):
        raise UserError(
            f"the tokenizer has no settings {sorted(unknown)}; it has path, package, begin_token, "
            f"{', '.join(known)}"
        )
    if package is not None:
        path = package_file(package, path or "*tokenizer.json")
    elif not path:
        raise UserError(
            "the tokenizer has no path; set it to a local folder that contains tokenizer.json"
        )
    tokenizer = load_tokenizer(path, **settings)
    return tokenizer if begin_token is None else _with_begin_token(tokenizer, begin_token)


def _load_backend(path: Path) -> tuple[tokenizers.Tokenizer, Path]:
    """Return the tokenizer at a path, and the folder that contains its settings."""
    if path.is_file():
        return _read_tokenizer_json(path), path.parent
    if (path / "tokenizer.json").is_file():
        return _read_tokenizer_json(path / "tokenizer.json"), path
    if path.is_dir():
        return _load_with_transformers(path), path
    raise UserError(
        f"no tokenizer at {str(path)!r}; expected a local folder with tokenizer.json (or a "
        "spiece.model that transformers can read), or CLIP's bpe_simple_vocab_16e6.txt.gz"
    )


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise UserError(
            f"{path} is not a tokenizer ({error}); expected the tokenizer.json of the tokenizers "
            "library"
        ) from error


def _load_with_transformers(folder: Path) -> tokenizers.Tokenizer:
    import transformers  # takes seconds, and most tokenizers do not need it

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        listed = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "no file"
        raise UserError(
            f"no tokenizer in {folder}, which contains {listed}; expected tokenizer.json, or files "
            f"that transformers reads (its error: {' '.join(str(error).split())})"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{folder}: {type(loaded).__name__} has no fast version in transformers; convert "
            "it to tokenizer.json"
        )
    if loaded.pad_token is not None:
        backend.enable_padding(pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
    return backend


def _check_lower_case(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise UserError if `do_lower_case` of the folder's config contradicts the tokenizer."""
    config = folder / TOKENIZER_CONFIG
    fields = json.loads(config.read_text("utf-8")) if config.is_file() else {}
    expected = fields.get("do_lower_case")
    if expected is None:
        return
    normalizer = tokenizer.backend.normalizer
    normalize = normalizer.normalize_str if normalizer is not None else str
    if expected and normalize(CLEANINGS[tokenizer.cleaning]("A")) != normalize("a"):
        raise UserError(
            f"{config} has do_lower_case = true, but the tokenizer does not convert texts to lower "
            "case; set cleaning='lower', or 'canonicalize' for SigLIP"
        )
    if not expected and normalize("A") == normalize("a"):
        raise UserError(
            f"{config} has do_lower_case = false, but the normalizer in tokenizer.json converts "
            "texts to lower case; correct the file that is wrong"
        )


def _find_pad_id(backend: tokenizers.Tokenizer, folder: Path) -> int:
    if backend.padding is not None:
        return int(backend.padding["pad_id"])
    names: list[str] = [*PAD_NAMES]
    config = folder / TOKENIZER_CONFIG
    if config.is_file():
        pad = json.loads(config.read_text("utf-8")).get("pad_token")
        names.insert(0, pad["content"] if isinstance(pad, dict) else pad or "")
    for name in names:
        pad_id = backend.token_to_id(name)
        if pad_id is not None:
            return pad_id
    raise UserError(f"the tokenizer in {folder} names no padding token; set pad_id to its id")
