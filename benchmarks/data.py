"""Input speed: images/s from 500x375 JPEGs to training batches, in ours, PyTorch and tf.data.

.venv-peers/bin/python benchmarks/data.py [--tensorflow PYTHON] [--rounds 5] [--output FILE.json]

Unless stated otherwise, a variant crops images at random, resizes them to 224 pixels with bilinear
interpolation, flips them at random, and returns uint8 batches of 64 in host memory:
- ours, with threads and with worker processes;
- torch's DataLoader with torchvision on Pillow, and the same with normalized float32 output, as in
  torchvision's examples (ours normalizes on the device, in the step);
- open_clip's training transform (crops of at least 0.9 of the area, bicubic, no flip, normalized
  float32), and ours with the same crops;
- tf.data with the operations of big_vision's decode_jpeg_and_inception_crop, with its default
  resizing and with antialiasing, which all variants above have. It runs in the interpreter that
  --tensorflow names, in which tensorflow-cpu is installed.

Two variants only decode. They are upper bounds for pipelines with the same decoder: libjpeg-turbo
decodes full images in threads, and tf.data decodes the crops that it samples.

Every variant has one thread or process per core, and fills its buffers before it is timed. A round
times every variant once, over the same number of images. The images are 500x375 crops of the
photographs that scikit-image, scikit-learn and matplotlib contain, as JPEG of quality 95 with 4:2:0
chroma subsampling. Our variants read them from a WebDataset tar, the others from memory.
"""

import io
import os
import pickle
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from side_by_side import build_parser, format_table, medians, write_results

from imgtune_jax import data
from imgtune_jax.data.image import LazyJpeg, open_image

SIZE, BATCH_SIZE, PREFETCH = 224, 64, 2
CORES = len(os.sched_getaffinity(0))
PHOTOGRAPHS = {
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    "sklearn": ("china.jpg", "flower.jpg"),
    "matplotlib": ("grace_hopper.jpg",),
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}


def photographs() -> list[Image.Image]:
    """Return those of PHOTOGRAPHS whose package is installed, in RGB."""
    paths = []
    for package, names in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / FOLDERS[package]
            paths += [folder / name for name in names if (folder / name).is_file()]
    return [Image.open(path).convert("RGB") for path in paths]


def jpegs(count: int) -> list[bytes]:
    """Return random crops of the photographs at 500x375, with a fixed seed."""
    rng, images, encoded = np.random.default_rng(0), photographs(), []
    for i in range(count):
        image = images[i % len(images)]
        fraction = rng.uniform(0.8, 1.0)
        scale = fraction * min(image.width / 500, image.height / 375)
        w, h = 500 * scale, 375 * scale
        left, top = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
        box = (left, top, left + w, top + h)
        stream = io.BytesIO()
        image.resize((500, 375), Image.Resampling.BICUBIC, box).save(stream, "JPEG", quality=95)
        encoded.append(stream.getvalue())
    return encoded


CROP_AND_FLIP = [
    dict(name="random_resized_crop", size=SIZE, interpolation="bilinear"),
    dict(name="horizontal_flip"),
]
TENSORFLOW = {  # variant: the argument `resizing` of data_tf.py
    "tf.data": "resize",
    "tf.data, antialiased": "antialias",
    "tf.data, decoding only": "none",
}
OPEN_CLIP_CROP = [
    dict(name="random_resized_crop", size=SIZE, interpolation="bicubic", scale=(0.9, 1.0))
]


def ours(tar: Path, transforms: list[Any], *, threads: int, workers: int) -> Iterator[Any]:
    """Yield our batches without end."""
    transform = data.build_transform(transforms)
    return data.Pipeline(
        source=data.build_source({"name": "webdataset", "path": str(tar)}),
        transform=transform,
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_threads=threads,
        num_workers=workers,
        prefetch=PREFETCH,
    ).batches()


class TorchImages:
    """A map-style torch data set of JPEGs, decoded by Pillow.

    `augmentation` is "uint8" (torchvision's crop and flip), "float32" (the same, normalized as in
    torchvision's examples) or "open_clip".
    """

    def __init__(self, encoded: Sequence[bytes], augmentation: str) -> None:
        self.encoded, self.augmentation = encoded, augmentation

    def __len__(self) -> int:
        return 1 << 30  # so an epoch never ends

    def __getitem__(self, index: int) -> Any:
        image = Image.open(io.BytesIO(self.encoded[index % len(self.encoded)])).convert("RGB")
        return self.transform(image)

    @property
    def transform(self) -> Callable[[Image.Image], Any]:
        """The transform, built on first use in each worker."""
        if not hasattr(self, "_transform"):
            import peers
            import torch

            transforms = peers.torchvision().transforms

            steps: list[Any] = [
                transforms.RandomResizedCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
            if self.augmentation == "float32":
                mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
                steps += [
                    transforms.ConvertImageDtype(torch.float32),
                    transforms.Normalize(mean, std),
                ]
            self._transform = transforms.Compose(steps)
            if self.augmentation == "open_clip":
                self._transform = peers.open_clip().image_transform(SIZE, is_train=True)
        return self._transform


def torch_loader(encoded: Sequence[bytes], augmentation: str) -> Iterator[Any]:
    """Yield the batches of torch's DataLoader without end; `augmentation` as in TorchImages."""
    import torch

    def one_thread(_: int) -> None:
        torch.set_num_threads(1)

    loader = torch.utils.data.DataLoader(
        TorchImages(encoded, augmentation),  # pyright: ignore[reportArgumentType]
        batch_size=BATCH_SIZE,
        num_workers=CORES,
        prefetch_factor=PREFETCH,
        worker_init_fn=one_thread,
        multiprocessing_context="fork",
    )
    return iter(loader)


class TensorFlow:
    """A process that runs data_tf.py in another interpreter. Calling it times some batches."""

    def __init__(self, python: str, encoded: Sequence[bytes], folder: Path, resizing: str):
        jpeg_file = folder / "jpegs.pickle"
        jpeg_file.write_bytes(pickle.dumps(list(encoded)))
        command = [python, str(Path(__file__).with_name("data_tf.py")), str(jpeg_file)]
        command += [str(SIZE), str(BATCH_SIZE), str(CORES), resizing]
        env = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __call__(self, batches: int) -> float:
        """Return the seconds that this number of batches takes."""
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(f"{batches}\n")
        self.child.stdin.flush()
        return float(self.child.stdout.readline())


def time_decoding(encoded: Sequence[bytes]) -> Callable[[int], float]:
    """Return a function that times the decoding, in threads, of some batches of full images."""

    def decode_one(index: int) -> None:
        jpeg = open_image(encoded[index % len(encoded)])
        assert isinstance(jpeg, LazyJpeg)
        jpeg.decode(scratch=True)

    def run(batches: int) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(CORES) as pool:
            for _ in pool.map(decode_one, range(batches * BATCH_SIZE)):
                pass
        return time.perf_counter() - start

    return run


def time_batches(batches: Iterator[Any]) -> Callable[[int], float]:
    """Return a function that times a number of batches, after it has skipped the buffered ones."""

    def run(count: int) -> float:
        for _ in range(8 * CORES * PREFETCH):
            next(batches)
        start = time.perf_counter()
        for _ in range(count):
            next(batches)
        return time.perf_counter() - start

    return run


def write_tar(path: Path, encoded: Sequence[bytes]) -> None:
    """Write JPEGs as a WebDataset tar."""
    with tarfile.open(path, "w") as archive:
        for i, jpeg in enumerate(encoded):
            info = tarfile.TarInfo(f"{i:05d}.jpg")
            info.size = len(jpeg)
            archive.addfile(info, io.BytesIO(jpeg))


def build_variants(
    encoded: Sequence[bytes], folder: Path, tensorflow: str | None
) -> dict[str, Callable[[int], float]]:
    """Return, by variant, a function that times a number of batches, in seconds."""
    tar = folder / "photographs.tar"
    write_tar(tar, encoded)
    variants: dict[str, Callable[[int], float]] = {}
    if find_spec("torchvision"):
        variants["torch DataLoader, Pillow"] = time_batches(torch_loader(encoded, "uint8"))
        variants["the same, normalized"] = time_batches(torch_loader(encoded, "float32"))
        variants["open_clip's transform"] = time_batches(torch_loader(encoded, "open_clip"))
    variants[f"ours, {CORES} threads"] = time_batches(
        ours(tar, CROP_AND_FLIP, threads=CORES, workers=0)
    )
    variants[f"ours, {CORES} workers"] = time_batches(
        ours(tar, CROP_AND_FLIP, threads=1, workers=CORES)
    )
    same_crops = ours(tar, OPEN_CLIP_CROP, threads=CORES, workers=0)
    variants["ours, open_clip's crops"] = time_batches(same_crops)
    variants["decoding only"] = time_decoding(encoded)
    if tensorflow:
        for name, resizing in TENSORFLOW.items():
            variants[name] = TensorFlow(tensorflow, encoded, folder, resizing)
    return variants


def measure_rates(
    variants: dict[str, Callable[[int], float]], rounds: int, images: int
) -> dict[str, list[float]]:
    """Return the images/s of each variant in each round; a first, extra round is not counted."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    num_batches = images // BATCH_SIZE
    for round_index in range(rounds + 1):
        for name, run in variants.items():
            seconds = run(num_batches)
            time.sleep(1.5)  # its buffers become full, so it is idle while the next variant runs
            if round_index:
                rates[name].append(num_batches * BATCH_SIZE / seconds)
    return rates


def main() -> None:
    """Time all variants, one after another in every round, and print images/s."""
    parser = build_parser(__doc__)
    parser.add_argument("--tensorflow", help="an interpreter that has tensorflow-cpu")
    parser.add_argument("--images", type=int, default=1536, help="timed images per round")
    args = parser.parse_args()
    encoded = jpegs(1024)
    with tempfile.TemporaryDirectory() as folder:
        variants = build_variants(encoded, Path(folder), args.tensorflow)
        rates = measure_rates(variants, args.rounds, args.images)
    kilobytes = float(np.mean([len(jpeg) for jpeg in encoded])) / 1e3
    print(f"\n{len(encoded)} JPEGs of 500x375, {kilobytes:.0f} kB on average; {CORES} cores\n")
    print(format_table(rates, next(iter(rates)), unit="images/s"))
    for variant, rate in medians(rates).items():
        print(f"{variant}: {rate / CORES:.0f} images/s per core")
    write_results(args.output, images_per_second=rates, kilobytes=kilobytes)


if __name__ == "__main__":
    main()
