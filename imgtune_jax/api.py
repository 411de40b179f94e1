"""The Python interface: train a model, load a trained one, and use it.

`imgtune_jax.train` and `imgtune_jax.load` return a `TunedModel`.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from imgtune_jax import config as config_lib
from imgtune_jax import data, interop, param_tree
from imgtune_jax.errors import ExistingFileError, MissingFileError, UserError
from imgtune_jax.evals import GeneratedCaption, zeroshot
from imgtune_jax.evals.predictor import ModelPredictor
from imgtune_jax.paths import user_path
from imgtune_jax.training import checkpoint, loop, workdir_files
from imgtune_jax.training.experiment import Experiment, build_experiment

Image = Any  # a path, a PIL image, or an array u8[h w] / u8[h w 3] / u8[h w 4]


class Hit(NamedTuple):
    """One search result: index in the gallery, and cosine similarity to the query."""

    index: int
    score: float


class Label(NamedTuple):
    """One prediction: a label and its probability, of the model's `probability_kind`."""

    name: str
    probability: float


class ProbabilityKind(enum.Enum):
    """Meaning of the probabilities that `TunedModel.classify` returns."""

    SOFTMAX = "softmax over the labels, which add up to 100%"
    SIGMOID = "sigmoid of each image and label alone, which need not add up to 100%"


@dataclass(frozen=True)
class TunedModel:
    """A trained model. `step` is the training step of its parameters, or -1 if unknown.

    Raises UserError if parameters are not finite, since their embeddings would be meaningless.
    """

    predictor: ModelPredictor
    experiment: Experiment
    step: int

    def __post_init__(self) -> None:
        at_step = f" of step {self.step}" if self.step >= 0 else ""
        param_tree.check_finite(self.predictor.params, f"the parameters{at_step}")

    def encode_image(
        self, images: Image | Iterable[Image], *, skip_unreadable: bool = False
    ) -> Float[np.ndarray, "n d"]:
        """Return the unit-norm embeddings of one or more paths, PIL images or uint8 arrays.

        Raises UserError naming every unreadable image, with the cause. With `skip_unreadable`, the
        embedding of such an image is NaN, and a warning names it; the error is raised only if no
        image is readable.
        """
        source = data.ImageList.from_images(images)
        embeddings, valid = self.predictor.embed_images(source)
        source.check_readable(valid, skip_unreadable=skip_unreadable)
        return np.where(valid[:, None], embeddings, np.nan)

    def encode_text(self, texts: str | Iterable[str]) -> Float[np.ndarray, "n d"]:
        """Return the unit-norm embeddings of one or more texts."""
        return self.predictor.embed_texts(_checked_texts("text", texts))

    @property
    def probability_kind(self) -> ProbabilityKind:
        """SIGMOID for a model with a logit bias, such as SigLIP, else SOFTMAX."""
        has_bias = self.predictor.logit_bias is not None
        return ProbabilityKind.SIGMOID if has_bias else ProbabilityKind.SOFTMAX

    def classify(
        self,
        images: Image | Iterable[Image],
        labels: Iterable[str],
        templates: Iterable[str] = ("{}",),
        *,
        top: int = 5,
        skip_unreadable: bool = False,
    ) -> list[list[Label]]:
        """Classify images zero-shot. Return each image's `top` labels, most probable first.

        The embedding of a label is averaged over `templates` such as "a photo of a {}.", as in
        CLIP. `probability_kind` says what the probabilities are. Raises the UserErrors of
        `encode_image`; with `skip_unreadable`, an unreadable image has an empty list.
        """
        labels, templates = _checked_texts("label", labels), _checked_texts("template", templates)
        needed = 2 if self.probability_kind is ProbabilityKind.SOFTMAX else 1
        if len(set(labels)) < max(needed, len(labels)) or top < 1:
            raise UserError(
                f"labels = {labels}, top = {top}; expected {needed} or more distinct labels, "
                "and top of 1 or more"
            )
        class_embeddings = zeroshot.class_embeddings(self.predictor, labels, templates)
        embeddings = self.encode_image(images, skip_unreadable=skip_unreadable)
        probabilities = self._probabilities(embeddings @ class_embeddings.T)
        top_labels = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
        return [
            [Label(labels[j], float(row[j])) for j in indices if not np.isnan(row[j])]
            for row, indices in zip(probabilities, top_labels, strict=True)
        ]

    def caption(
        self,
        images: Image | Iterable[Image],
        *,
        language: str | None = None,
        n: int = 1,
        beam: int = 1,
        decoding: Mapping[str, Any] | None = None,
        seed: int = 0,
        skip_unreadable: bool = False,
    ) -> list[list[GeneratedCaption]]:
        """Generate captions. Return the `n` best of each image as (text, score), best first.

        `language` is one of `languages` (default: the first). The method is beam search of width
        max(`n`, `beam`), or greedy decoding for width 1. `decoding` is a mapping with another
        method or other settings, for `decoding.build_generation_config`. An example is
        {"method": {"name": "sample", "top_p": 0.9}, "max_new_tokens": 8}. `seed` is the random seed
        of sampling.

        Raises UserError for a model without a decoder, for an unknown language, and for unreadable
        images, naming each image and the cause. With `skip_unreadable`, such an image has an empty
        list, and a warning names it; the error is raised only if no image is readable.
        """
        if min(n, beam) < 1:
            raise UserError(f"n = {n}, beam = {beam}; expected 1 or more of each")
        settings = dict(decoding or {})
        if "method" in settings and (n, beam) != (1, 1):
            raise UserError(
                f"n = {n}, beam = {beam} with decoding['method'] = {settings['method']}; n and "
                "beam configure a beam search: remove them, or the method"
            )
        if max(n, beam) > 1:
            settings["method"] = {"name": "beam", "width": max(n, beam), "n": n}
        source = data.ImageList.from_images(images)
        captions, valid = self.predictor.generate_captions(
            source, prefix=self._caption_prefix(language), decoding=settings, seed=seed
        )
        source.check_readable(valid, skip_unreadable=skip_unreadable)
        return captions

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that `caption` accepts, sorted by decreasing frequency in training.

        These are the caption sets with a prefix (config.data.prefixes).
        """
        cfg = self.experiment.config.data
        return tuple(sorted(cfg.prefixes, key=lambda name: -cfg.caption_weights[name]))

    def search(
        self,
        query: str | Image,
        gallery: Iterable[Image] | Iterable[str] | Float[np.ndarray, "n d"],
        *,
        k: int = 5,
    ) -> list[Hit]:
        """Return the `k` items of `gallery` that are most similar to `query`, best first.

        A string is an image if it is the path of an image file, and a text otherwise. `gallery`
        contains images, texts, or embeddings from `encode_image` or `encode_text`. Embeddings can
        be reused for many queries; those that are NaN, as of a skipped image, are never returned.
        Raises UserError for a query that looks like the path of an image that does not exist.
        """
        if k < 1:
            raise UserError(f"k = {k}; expected 1 or more")
        if isinstance(query, str) and _has_image_suffix(query) and not _is_image_path(query):
            raise MissingFileError(f"no image at {query}; expected an image, or a text")
        embeddings: Any = gallery if _is_embeddings(gallery) else self._encode_any(list(gallery))
        query_embedding = self._encode_any([query])[0]
        if embeddings.shape[1:] != query_embedding.shape:
            raise UserError(
                f"the embeddings of the gallery have the shape {embeddings.shape}, but this model "
                f"returns vectors of {len(query_embedding)}; encode the gallery with this model"
            )
        scores = embeddings @ query_embedding
        nearest = np.argsort(-scores, kind="stable")[:k]
        return [Hit(int(i), float(scores[i])) for i in nearest if not np.isnan(scores[i])]

    def save(self, folder: str | Path) -> Path:
        """Write the config, the tokenizer and the parameters to a folder that `load` reads.

        Raises ExistingFileError if the folder exists and is not empty.
        """
        folder = user_path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ExistingFileError(f"{folder} is not an empty folder; expected a new or empty one")
        folder.mkdir(parents=True, exist_ok=True)
        config_lib.save_config(self.experiment.config, folder / "config.json")
        self.experiment.tokenizer.save(folder / "tokenizer")
        interop.save_params(self.predictor.params, folder / workdir_files.SAVED_PARAMS)
        return folder

    def _caption_prefix(self, language: str | None) -> str:
        prefixes, languages = self.experiment.config.data.prefixes, self.languages
        if language is None:
            return prefixes[languages[0]] if languages else ""
        if not languages:
            raise UserError(
                f"language = {language!r}, but this model was trained without prefixes "
                "(config.data.prefixes) and has no languages; omit `language`"
            )
        if language not in languages:
            raise UserError(f"language = {language!r}; expected one of {', '.join(languages)}")
        return prefixes[language]

    def _probabilities(self, similarities: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
        """Return the probabilities of cosine similarities, of the model's `probability_kind`."""
        scale, bias = self.predictor.logit_scale, self.predictor.logit_bias
        if bias is not None:
            return np.exp(-np.logaddexp(0, -(scale * similarities + bias)))
        logits = scale * similarities
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        return probabilities / probabilities.sum(1, keepdims=True)

    def _encode_any(self, items: Sequence[Any]) -> Float[np.ndarray, "n d"]:
        if all(isinstance(item, str) and not _is_image_path(item) for item in items):
            return self.encode_text(list(items))
        return self.encode_image(items)


def load(folder: str | Path, *, step: int | None = None, use_memo: bool = False) -> TunedModel:
    """Load a model from the folder of a run, or from a folder that `TunedModel.save` wrote.

    From a run, the checkpoint of `step` is loaded (default: the newest). With `use_memo`, the image
    features of a data set stay in memory, so that several evaluators can share them. Raises
    MissingFileError if the folder or the checkpoint does not exist.
    """
    folder = user_path(folder).absolute()
    config = config_lib.load_config(folder / "config.json")
    experiment = build_experiment(config, tokenizer_dir=folder / "tokenizer")
    if (folder / workdir_files.SAVED_PARAMS).is_file():
        params, saved_step = interop.load_params(folder / workdir_files.SAVED_PARAMS), -1
    else:
        target, frozen_target = experiment.abstract_split_params
        trainable, digest, saved_step = checkpoint.restore_params(folder, step, target)
        frozen = checkpoint.restore_frozen(folder, digest, frozen_target)
        params = param_tree.merge(trainable, frozen)
    return TunedModel(experiment.predictor(params, use_memo=use_memo), experiment, saved_step)


def train(
    config: config_lib.Config | ConfigDict,
    workdir: str | Path,
    *,
    allow_changed_data: bool = False,
) -> TunedModel:
    """Train the model that `config` describes, or resume its run in `workdir`; return the model.

    With `allow_changed_data`, a run may be resumed on other training data than it was trained on.

    Raises UserError if the config is invalid or `workdir` has another run, NonFiniteLossError if
    the loss is not finite, and TooManyBadRecordsError if too many records are unreadable.
    """
    if not isinstance(config, config_lib.Config):
        config = config_lib.parse_config(config)
    workdir = user_path(workdir).absolute()
    trained = loop.train(config, workdir, allow_changed_data=allow_changed_data)
    experiment = build_experiment(config, tokenizer_dir=workdir / "tokenizer")
    # A new predictor, because `trained` memoizes the features of every image that it encodes.
    predictor = experiment.predictor(trained.params, use_memo=False)
    return TunedModel(predictor, experiment, checkpoint.saved_steps(workdir)[-1])


def _checked_texts(what: str, texts: str | Iterable[str]) -> list[str]:
    """Return one or more texts as a list. Raises UserError for one that is not valid Unicode."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{what} {text!r} is a {type(text).__name__}; expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{what} {text!r} is not Unicode; expected UTF-8 input") from error
    return texts


def _has_image_suffix(text: str) -> bool:
    return text.lower().endswith(data.IMAGE_SUFFIXES)


def _is_image_path(text: str) -> bool:
    return _has_image_suffix(text) and os.path.isfile(user_path(text))


def _is_embeddings(gallery: Any) -> bool:
    return isinstance(gallery, np.ndarray) and gallery.ndim == 2 and gallery.dtype.kind == "f"
