"""The Python interface: train a model, load a trained one, and use it.

`imgtune_jax.train` and `imgtune_jax.load` return a `TunedModel`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from ml_collections import ConfigDict

from imgtune_jax import config as config_lib
from imgtune_jax import data, interop, param_tree
from imgtune_jax.errors import ExistingFileError, MissingFileError, UserError
from imgtune_jax.evals import GeneratedCaption, zeroshot
from imgtune_jax.evals.predictor import ModelPredictor
from imgtune_jax.training import checkpoint, loop, workdir_files
from imgtune_jax.training.experiment import Experiment, build_experiment

Image = Any  # a path, a PIL image, or an array u8[h w] / u8[h w 3] / u8[h w 4]


class Hit(NamedTuple):
    """One search result: index in the gallery, and cosine similarity to the query."""

    index: int
    score: float


class Label(NamedTuple):
    """One prediction: a label, and its probability among the labels of the call."""

    name: str
    probability: float


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

    def encode_image(self, images: Image | Sequence[Image]) -> Float[np.ndarray, "n d"]:
        """Return the unit-norm embeddings of one or more paths, PIL images or uint8 arrays.

        Raises UserError naming every unreadable image, with the cause.
        """
        source = _ImageSource.from_images(images)
        embeddings, valid = self.predictor.embed_images(source)
        source.check_readable(valid)
        return embeddings

    def encode_text(self, texts: str | Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Return the unit-norm embeddings of one or more texts."""
        return self.predictor.embed_texts([texts] if isinstance(texts, str) else texts)

    def classify(
        self,
        images: Image | Sequence[Image],
        labels: Sequence[str],
        templates: Sequence[str] = ("{}",),
        *,
        top: int = 5,
    ) -> list[list[Label]]:
        """Classify images zero-shot. Return each image's `top` labels, most probable first.

        The embedding of a label is averaged over `templates` such as "a photo of a {}.", as in
        CLIP.
        """
        labels = list(labels)
        weights = zeroshot.class_embeddings(self.predictor, labels, templates)
        logits = self.predictor.logit_scale * self.encode_image(images) @ weights.T
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        top_labels = np.argsort(-probabilities, axis=1)[:, :top]
        return [
            [Label(str(labels[j]), float(row[j])) for j in indices]
            for row, indices in zip(probabilities, top_labels, strict=True)
        ]

    def caption(
        self,
        images: Image | Sequence[Image],
        *,
        language: str | None = None,
        n: int = 1,
        beam: int = 1,
        decoding: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> list[list[GeneratedCaption]]:
        """Generate captions. Return the `n` best of each image as (text, score), best first.

        `language` is one of `languages` (default: the first). The method is beam search of width
        max(`n`, `beam`), or greedy decoding for width 1. `decoding` is a mapping with another
        method or other settings, for `decoding.build_generation_config`. An example is
        {"method": {"name": "sample", "top_p": 0.9}, "max_new_tokens": 8}. `seed` is the random seed
        of sampling.

        Raises UserError for a model without a decoder, for an unknown language, and for unreadable
        images, naming each image and the cause.
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
        source = _ImageSource.from_images(images)
        captions, valid = self.predictor.generate_captions(
            source, prefix=self._caption_prefix(language), decoding=settings, seed=seed
        )
        source.check_readable(valid)
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
        gallery: Sequence[Image] | Sequence[str] | Float[np.ndarray, "n d"],
        *,
        k: int = 5,
    ) -> list[Hit]:
        """Return the `k` items of `gallery` that are most similar to `query`, best first.

        A string is an image if it is the path of an image file, and a text otherwise. `gallery`
        contains images, texts, or embeddings from `encode_image` or `encode_text`. Embeddings can
        be reused for many queries.
        """
        embeddings = gallery if _is_embeddings(gallery) else self._encode_any(list(gallery))
        scores = np.asarray(embeddings) @ self._encode_any([query])[0]
        nearest = np.argsort(-scores, kind="stable")[:k]
        return [Hit(int(i), float(scores[i])) for i in nearest]

    def save(self, folder: str | Path) -> Path:
        """Write the config, the tokenizer and the parameters to a folder that `load` reads.

        Raises ExistingFileError if the folder exists and is not empty.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise ExistingFileError(f"{folder} is not empty; expected a new or empty folder")
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
    folder = Path(folder).absolute()
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
    workdir = Path(workdir).absolute()
    trained = loop.train(config, workdir, allow_changed_data=allow_changed_data)
    experiment = build_experiment(config, tokenizer_dir=workdir / "tokenizer")
    # A new predictor, because `trained` memoizes the features of every image that it encodes.
    predictor = experiment.predictor(trained.params, use_memo=False)
    return TunedModel(predictor, experiment, checkpoint.saved_steps(workdir)[-1])


@dataclass(frozen=True)
class _ImageSource:
    """A `data.Source` of the images in a call."""

    records: tuple[data.Record, ...]

    @classmethod
    def from_images(cls, images: Any) -> _ImageSource:
        """Return a source of one or more paths, PIL images or arrays."""
        records = tuple(_record(i, image) for i, image in enumerate(_as_list(images)))
        if not records:
            raise UserError("no images given; expected one or more paths, PIL images or arrays")
        return cls(records)

    def check_readable(self, valid: Bool[np.ndarray, " n"]) -> None:
        """Raise UserError naming every unreadable image, with the cause."""
        if not valid.all():
            unreadable = [self.records[i] for i in np.flatnonzero(~valid)]
            lines = [f"{record.key}: {_read_error(record)}" for record in unreadable]
            raise UserError("these images cannot be read:\n  " + "\n  ".join(lines))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> data.Record:
        return self.records[index]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for record in self.records:
            image = record.image
            digest.update(image if isinstance(image, bytes) else _image_bytes(image))
        return digest.hexdigest()


def _image_bytes(image: Any) -> bytes:
    array = np.asarray(image)
    return f"{array.shape}{array.dtype}".encode() + array.tobytes()


def _as_list(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return list(images)
    if isinstance(images, np.ndarray) and images.ndim == 4:
        return list(images)
    return [images]


def _record(index: int, image: Any) -> data.Record:
    if isinstance(image, str | Path):
        path = Path(image)
        if not path.is_file():
            raise MissingFileError(f"no image at {path}")
        return data.Record(key=str(path), image=path.read_bytes(), captions={})
    return data.Record(key=f"image {index}", image=image, captions={})


def _read_error(record: data.Record) -> str:
    try:
        data.decode_image(record.image)
    except data.BadRecord as error:
        return str(error)
    return "the image can be decoded, but not preprocessed"


def _is_image_path(text: str) -> bool:
    return text.lower().endswith(data.IMAGE_SUFFIXES) and Path(text).is_file()


def _is_embeddings(gallery: Any) -> bool:
    return isinstance(gallery, np.ndarray) and gallery.ndim == 2 and gallery.dtype.kind == "f"
