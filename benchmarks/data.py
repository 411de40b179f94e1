"""Input: images/s of a training transform on 500x375 JPEGs, ours, PyTorch's and tf.data.

.venv-peers/bin/python benchmarks/data.py [--tensorflow PYTHON] [--rounds 5] [--output FILE.json]

Random-resized crop to 224, bilinear, and flip, to uint8 batches of 64 in host memory. Ours with
threads and with worker processes; torch DataLoader with torchvision on Pillow, and the same to
normalised float32, as torchvision's examples give a model (ours leaves that to the step on the
device). Then open_clip's own training transform (windows of at least 0.9 of the area, bicubic, no
flip, to normalised float32) and ours of the same windows. And, in the
interpreter that --tensorflow names (one with tensorflow-cpu installed), tf.data with the operations
of big_vision's decode_jpeg_and_inception_crop, as it is by default and antialiased as ours and
Pillow's are. Two more arms only decode: libjpeg-turbo whole pictures, in threads, and tf.data the
windows that it draws. They are what no pipeline on that decoder can pass.

Every arm has a thread or process a core, fills its buffers before each round, and is timed over the
same number of images, one arm after another. The pictures are 500x375 parts of the photographs that
scikit-image, scikit-learn and matplotlib ship, JPEG of quality 95, 4:2:0;
ours are read from a WebDataset tar, the peers' from memory.
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
from side_by_side import arguments, medians, table, write

from imgtune_jax import data

SIZE, BATCH_SIZE, PREFETCH = 224, 64, 2
CORES = len(os.sched_getaffinity(0))
PHOTOGRAPHS = {
    "skimage": ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"),
    "sklearn": ("china.jpg", "flower.jpg"),
    "matplotlib": ("grace_hopper.jpg",),
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "matplotlib": "mpl-data/sample_data"}


def photographs() -> list[Image.Image]:
    """Those of PHOTOGRAPHS whose package is installed."""
    found = []
    for package, names in PHOTOGRAPHS.items():
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / FOLDERS[package]
            found += [folder / name for name in names if (folder / name).is_file()]
    return [Image.open(path).convert("RGB") for path in found]


def jpegs(count: int) -> list[bytes]:
    """Parts of photographs at 500x375, drawn with a fixed seed."""
    rng, pictures, out = np.random.default_rng(0), photographs(), []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        share = rng.uniform(0.8, 1.0)
        scale = share * min(picture.width / 500, picture.height / 375)
        w, h = 500 * scale, 375 * scale
        left, top = rng.uniform(0, picture.width - w), rng.uniform(0, picture.height - h)
        box = (left, top, left + w, top + h)
        stream = io.BytesIO()
        picture.resize((500, 375), Image.Resampling.BICUBIC, box).save(stream, "JPEG", quality=95)
        out.append(stream.getvalue())
    return out


CROP = [
    dict(name="random_resized_crop", size=SIZE, interpolation="bilinear"),
    dict(name="horizontal_flip"),
]
TENSORFLOW = {  # arm: what follows on decoding
    "tf.data": "resize",
    "tf.data, antialiased": "antialias",
    "tf.data, decoding alone": "nothing",
}
OPEN_CLIP_CROP = [
    dict(name="random_resized_crop", size=SIZE, interpolation="bicubic", scale=(0.9, 1.0))
]


def ours(tar: Path, transforms: list[Any], *, threads: int, workers: int) -> Iterator[Any]:
    """Our batches without end."""
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

    `augment` is "uint8" (torchvision's crop and flip), "float32" (and normalised, as torchvision's
    examples do) or "open_clip".
    """

    def __init__(self, encoded: Sequence[bytes], augment: str) -> None:
        self.encoded, self.augment = encoded, augment

    def __len__(self) -> int:
        return 1 << 30  # so an epoch never ends

    def __getitem__(self, index: int) -> Any:
        image = Image.open(io.BytesIO(self.encoded[index % len(self.encoded)])).convert("RGB")
        return self.transform(image)

    @property
    def transform(self) -> Callable[[Image.Image], Any]:
        """Built in the worker, once."""
        if not hasattr(self, "_transform"):
            import peers
            import torch

            transforms = peers.torchvision().transforms

            steps: list[Any] = [
                transforms.RandomResizedCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.PILToTensor(),
            ]
            if self.augment == "float32":
                mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
                steps += [
                    transforms.ConvertImageDtype(torch.float32),
                    transforms.Normalize(mean, std),
                ]
            self._transform = transforms.Compose(steps)
            if self.augment == "open_clip":
                self._transform = peers.open_clip().image_transform(SIZE, is_train=True)
        return self._transform


def torch_loader(encoded: Sequence[bytes], augment: str) -> Iterator[Any]:
    """torch DataLoader's batches without end."""
    import torch

    def one_thread(_: int) -> None:
        torch.set_num_threads(1)

    loader = torch.utils.data.DataLoader(
        TorchImages(encoded, augment),  # pyright: ignore[reportArgumentType]
        batch_size=BATCH_SIZE,
        num_workers=CORES,
        prefetch_factor=PREFETCH,
        worker_init_fn=one_thread,
        multiprocessing_context="fork",
    )
    return iter(loader)


class TensorFlow:
    """data_tf.py in another interpreter: a line with a number of batches in, seconds out."""

    def __init__(self, python: str, encoded: Sequence[bytes], folder: Path, then: str):
        stored = folder / "jpegs.pickle"
        stored.write_bytes(pickle.dumps(list(encoded)))
        command = [python, str(Path(__file__).with_name("data_tf.py")), str(stored)]
        command += [str(SIZE), str(BATCH_SIZE), str(CORES), then]
        quiet = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet
        )

    def __call__(self, batches: int) -> float:
        """Seconds of so many batches."""
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(f"{batches}\n")
        self.child.stdin.flush()
        return float(self.child.stdout.readline())


def decoding(encoded: Sequence[bytes]) -> Callable[[int], float]:
    """Seconds of so many batches of whole pictures, decoded in threads and let go."""

    def one(index: int) -> None:
        picture = data.image.peek(encoded[index % len(encoded)])
        assert isinstance(picture, data.image.Jpeg)
        picture.decode(scratch=True)

    def run(batches: int) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(CORES) as pool:
            for _ in pool.map(one, range(batches * BATCH_SIZE)):
                pass
        return time.perf_counter() - began

    return run


def timed(batches: Iterator[Any]) -> Callable[[int], float]:
    """Seconds of so many batches, after as many as may have been waiting in buffers."""

    def run(count: int) -> float:
        for _ in range(8 * CORES * PREFETCH):
            next(batches)
        began = time.perf_counter()
        for _ in range(count):
            next(batches)
        return time.perf_counter() - began

    return run


def main() -> None:
    """Time all arms, interleaved, and print images/s."""
    parser = arguments(__doc__)
    parser.add_argument("--tensorflow", help="an interpreter that has tensorflow-cpu")
    parser.add_argument("--images", type=int, default=1536, help="timed images a round")
    o = parser.parse_args()
    encoded = jpegs(1024)
    with tempfile.TemporaryDirectory() as name:
        tar = Path(name, "photographs.tar")
        with tarfile.open(tar, "w") as archive:
            for i, one in enumerate(encoded):
                info = tarfile.TarInfo(f"{i:05d}.jpg")
                info.size = len(one)
                archive.addfile(info, io.BytesIO(one))
        arms: dict[str, Callable[[int], float]] = {}
        if find_spec("torchvision"):
            arms["torch DataLoader, Pillow"] = timed(torch_loader(encoded, "uint8"))
            arms["the same, normalised"] = timed(torch_loader(encoded, "float32"))
            arms["open_clip's transform"] = timed(torch_loader(encoded, "open_clip"))
        arms[f"ours, {CORES} threads"] = timed(ours(tar, CROP, threads=CORES, workers=0))
        arms[f"ours, {CORES} workers"] = timed(ours(tar, CROP, threads=1, workers=CORES))
        same = ours(tar, OPEN_CLIP_CROP, threads=CORES, workers=0)
        arms["ours, open_clip's windows"] = timed(same)
        arms["decoding alone"] = decoding(encoded)
        if o.tensorflow:
            for how, then in TENSORFLOW.items():
                arms[how] = TensorFlow(o.tensorflow, encoded, Path(name), then)
        rates = interleaved_rates(arms, o.rounds, o.images)
    kilobytes = float(np.mean([len(x) for x in encoded])) / 1e3
    print(f"\n{len(encoded)} JPEGs of 500x375, {kilobytes:.0f} kB in the mean; {CORES} cores\n")
    print(table(rates, next(iter(rates)), unit="images/s"))
    for arm, rate in medians(rates).items():
        print(f"{arm}: {rate / CORES:.0f} images/s a core")
    write(o.output, images_per_second=rates, kilobytes=kilobytes)


def interleaved_rates(
    arms: dict[str, Callable[[int], float]], rounds: int, images: int
) -> dict[str, list[float]]:
    """Images a second of each arm, one round of all arms after another, the first uncounted."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    count = images // BATCH_SIZE
    for turn in range(rounds + 1):
        for name, run in arms.items():
            seconds = run(count)
            time.sleep(1.5)  # its buffers fill up, so that it rests while the next arm runs
            if turn:
                rates[name].append(count * BATCH_SIZE / seconds)
    return rates


if __name__ == "__main__":
    main()
