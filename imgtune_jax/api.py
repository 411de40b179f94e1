"""Using a trained model: `model = imgtune_jax.load("runs/demo")`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from imgtune_jax import config as config_lib
from imgtune_jax import data, interop, param_tree
from imgtune_jax.evals import GeneratedCaption, zeroshot
from imgtune_jax.evals.predictor import ModelPredictor
from imgtune_jax.training import checkpoint, experiment

Image = Any  # a path, a PIL image, or an array u8[h w] / u8[h w 3] / u8[h w 4]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Hit(NamedTuple):
    """One search result: position in the gallery and cosine similarity."""

    index: int
    score: float


class Label(NamedTuple):
    """One classification: the label and its probability among the labels given."""

    name: str
    probability: float


@dataclass(frozen=True)
class TunedModel:
    """Both towers, ready to use. `step` is the training step the weights come from."""

    predictor: ModelPredictor
    experiment: experiment.Experiment
    step: int

    def encode_image(self, images: Image | Sequence[Image]) -> Float[np.ndarray, "n d"]:
        """Unit-norm embeddings of images: paths, PIL images or uint8 arrays, one or many.

        Raises ValueError naming every image that could not be read, with the cause.
        """
        source = _ImageSource.of(images)
        rows, valid = self.predictor.embed_images(source)
        source.check(valid)
        return rows

    def encode_text(self, texts: str | Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Unit-norm embeddings of texts."""
        return self.predictor.embed_texts([texts] if isinstance(texts, str) else texts)

    def classify(
        self,
        images: Image | Sequence[Image],
        labels: Sequence[str],
        templates: Sequence[str] = ("{}",),
        *,
        top: int = 5,
    ) -> list[list[Label]]:
        """Zero-shot: for each image the `top` labels, best first.

        Each label's embedding is the mean over `templates` ("a photo of a {}."), as in CLIP.
        """
        labels = list(labels)
        weights = zeroshot.class_embeddings(self.predictor, labels, templates)
        logits = self.predictor.logit_scale * self.encode_image(images) @ weights.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        order = np.argsort(-p, axis=1)[:, :top]
        return [
            [Label(str(labels[j]), float(row[j])) for j in best]
            for row, best in zip(p, order, strict=True)
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
        """What the model writes of images: for each its `n` best captions, (text, score).

        `language` is one of `languages`, the first of them by default. `beam` hypotheses are kept
        (`n` if that is more); 1 is greedy. Instead, `decoding` may hold all that `decoding.build`
        takes: {"method": {"name": "sample", "top_p": 0.9}, "max_new_tokens": 8}, drawn by `seed`.
        Raises ValueError for a model that writes no captions, an unknown language, and images that
        could not be read, all of them named with the cause.
        """
        if min(n, beam) < 1:
            raise ValueError(f"n = {n}, beam = {beam}; wanted 1 or more of each")
        settings = dict(decoding or {})
        if "method" in settings and (n, beam) != (1, 1):
            raise ValueError("n and beam belong to beam search; decoding has a method of its own")
        if max(n, beam) > 1:
            settings["method"] = {"name": "beam", "width": max(n, beam), "n": n}
        source = _ImageSource.of(images)
        written, valid = self.predictor.generate_captions(
            source, prefix=self._prefix(language), decoding=settings, seed=seed
        )
        source.check(valid)
        return written

    @property
    def languages(self) -> tuple[str, ...]:
        """What `caption` can be asked for: the caption sets that training put a prefix before."""
        c = self.experiment.config.data
        return tuple(sorted(c.prefixes, key=lambda name: -c.caption_weights[name]))

    def search(
        self,
        query: str | Image,
        gallery: Sequence[Image] | Sequence[str] | Float[np.ndarray, "n d"],
        *,
        k: int = 5,
    ) -> list[Hit]:
        """The k nearest of `gallery`, best first.

        `query` is an image, or a text (a string that is no image file's path). `gallery` is
        embeddings from `encode_image` or `encode_text` (reuse them between queries), or images, or
        texts.
        """
        rows = gallery if _is_embeddings(gallery) else self._encode_any(list(gallery))
        scores = np.asarray(rows) @ self._encode_any([query])[0]
        best = np.argsort(-scores, kind="stable")[:k]
        return [Hit(int(i), float(scores[i])) for i in best]

    def save(self, folder: str | Path) -> Path:
        """Write a self-contained folder (config, tokenizer, params.safetensors) that `load` reads.

        Raises FileExistsError rather than write over anything.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty; choose a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        config_lib.save_config(self.experiment.config, folder / "config.json")
        self.experiment.tokenizer.save(folder / "tokenizer")
        interop.save_params(self.predictor.params, folder / "params.safetensors")
        return folder

    def _prefix(self, language: str | None) -> str:
        prefixes, known = self.experiment.config.data.prefixes, self.languages
        if language is None:
            return prefixes[known[0]] if known else ""
        if not known:
            raise ValueError(
                f"no language {language!r}: this model was trained without prefixes "
                "(config.data.prefixes), so it writes as its captions were; name no language"
            )
        if language not in known:
            raise ValueError(f"no language {language!r}; this model writes: {', '.join(known)}")
        return prefixes[language]

    def _encode_any(self, items: Sequence[Any]) -> Float[np.ndarray, "n d"]:
        if all(isinstance(i, str) and not _is_image_path(i) for i in items):
            return self.encode_text(list(items))
        return self.encode_image(items)


def load(folder: str | Path, *, step: int | None = None, use_memo: bool = False) -> TunedModel:
    """A run's model (its newest checkpoint, or `step`), or a folder that `TunedModel.save` wrote.

    With `keep`, the image features of a data set stay in memory for the next evaluator.
    Raises FileNotFoundError when there is no such folder or checkpoint.
    """
    folder = Path(folder).absolute()
    config = config_lib.load_config(folder / "config.json")
    exp = experiment.build_experiment(config, tokenizer_dir=folder / "tokenizer")
    if (exported := folder / "params.safetensors").is_file():
        params = interop.load_params(exported)
        return TunedModel(exp.predictor(params, use_memo=use_memo), exp, step=-1)
    target, frozen_target = exp.abstract_split_params
    trainable, digest, found = checkpoint.restore_params(folder, step, target)
    frozen = checkpoint.restore_frozen(folder, digest, frozen_target)
    return TunedModel(
        exp.predictor(param_tree.merge(trainable, frozen), use_memo=use_memo), exp, step=found
    )


@dataclass(frozen=True)
class _ImageSource:
    """Records in memory, as a source."""

    records: tuple[data.Record, ...]

    @classmethod
    def of(cls, images: Any) -> _ImageSource:
        """Of paths, PIL images or arrays, one or many."""
        records = tuple(_record(i, image) for i, image in enumerate(_as_list(images)))
        if not records:
            raise ValueError("no images given; wanted at least one path, PIL image or array")
        return cls(records)

    def check(self, valid: Bool[np.ndarray, " n"]) -> None:
        """Raise ValueError naming every image that could not be read, with the cause."""
        if not valid.all():
            broken = [self.records[i] for i in np.flatnonzero(~valid)]
            lines = [f"{record.key}: {_read_error(record)}" for record in broken]
            raise ValueError("could not read these images:\n  " + "\n  ".join(lines))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> data.Record:
        return self.records[index]

    @property
    def fingerprint(self) -> str:
        h = hashlib.sha256()
        for record in self.records:
            h.update(
                record.image if isinstance(record.image, bytes) else _image_bytes(record.image)
            )
        return h.hexdigest()


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
            raise FileNotFoundError(f"no image at {path}")
        return data.Record(key=str(path), image=path.read_bytes(), captions={})
    return data.Record(key=f"image {index}", image=image, captions={})


def _read_error(record: data.Record) -> str:
    try:
        data.decode_image(record.image)
    except data.BadRecord as error:
        return str(error)
    return "could not be preprocessed"


def _is_image_path(text: str) -> bool:
    return text.lower().endswith(IMAGE_SUFFIXES) and Path(text).is_file()


def _is_embeddings(gallery: Any) -> bool:
    return isinstance(gallery, np.ndarray) and gallery.ndim == 2 and gallery.dtype.kind == "f"
