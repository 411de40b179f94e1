"""Build the emoji image-text corpus from npm packages. Every build has the same bytes.

    python corpora/emoji/build.py                            # downloads with `npm pack`
    python corpora/emoji/build.py --packages DIR --out OUT   # from downloaded packages

The output is two WebDataset tars, `seen.tar` and `heldout.tar`. A key is a concept (an emoji
without skin tone). Its members are three images and a JSON of names and keywords in ten languages:

    1f98a.fluent.webp  1f98a.google.webp  1f98a.json  1f98a.twitter.webp

The bytes depend on the WebP encoder, so Pillow's version is pinned and checked. A build takes about
two minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import PIL
from PIL import Image

PILLOW = "13.0.0"
SIZE = 64
BLOCK = 512  # bytes; tar pads each file to a multiple of it
VENDORS = ("fluent", "google", "twitter")
LANGUAGES = ("en", "zh", "de", "es", "fr", "ar", "hi", "sw", "ja", "ru")
# npm package -> (file that `npm pack` writes, its sha256)
PACKAGES = {
    "emoji-datasource-google@16.0.0": (
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "emoji-datasource-twitter@16.0.0": (
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "@lobehub/fluent-emoji-3d@1.1.0": (
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "cldr-annotations-full@48.2.0": (
        "cldr-annotations-full-48.2.0.tgz",
        "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1",
    ),
    "cldr-annotations-derived-full@48.2.0": (
        "cldr-annotations-derived-full-48.2.0.tgz",
        "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e",
    ),
}


def is_held_out(subcategory: str) -> bool:
    """Return whether a subcategory is in the held-out split.

    A subcategory is not split, since its concepts (such as clock faces) are near-duplicates.
    """
    digest = int(hashlib.sha256(subcategory.encode()).hexdigest(), 16)
    return digest % 5 == 0 and subcategory != "country-flag"


def fetch(packages: Path) -> None:
    """Download the packages that the folder lacks, with `npm pack`."""
    for spec, (file, _) in PACKAGES.items():
        if not (packages / file).exists():
            command = ["npm", "pack", spec, "--silent", "--pack-destination", str(packages)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def verify(packages: Path) -> None:
    """Raise ValueError unless every package is in the folder with its pinned digest."""
    for spec, (file, expected) in PACKAGES.items():
        path = packages / file
        if not path.exists():
            raise ValueError(f"{path} is missing; run `npm pack {spec}` in its folder")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != expected:
            raise ValueError(
                f"{path} has sha256 {digest}; expected {expected}; download {spec} again"
            )


def members(packages: Path, package: str) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of every file in the one .tgz file whose name begins with `package`."""
    (file,) = [f for f, _ in PACKAGES.values() if f.startswith(package)]
    with tarfile.open(packages / file) as tar:
        for info in tar:
            stream = tar.extractfile(info)
            if stream is not None:
                yield info.name, stream.read()


def concept_id(unified: str) -> str:
    """Return the id of a concept: "1F3F3-FE0F" -> "1f3f3". U+FE0F only selects emoji style."""
    return unified.lower().replace("-fe0f", "")


def read_images(packages: Path, vendor: str) -> dict[str, bytes]:
    """Return {concept: encoded image} of all images of a vendor, including skin-tone variants."""
    package = "lobehub-fluent" if vendor == "fluent" else f"emoji-datasource-{vendor}"
    folder = "/assets/" if vendor == "fluent" else f"/img/{vendor}/64/"
    return {
        concept_id(Path(name).stem): data
        for name, data in members(packages, package)
        if folder in name and name.endswith((".webp", ".png"))
    }


def read_annotations(packages: Path) -> dict[str, dict[str, Any]]:
    """Return {language: {emoji: {"tts": [name], "default": keywords}}}, from both CLDR packages."""
    annotations: dict[str, dict[str, Any]] = {language: {} for language in LANGUAGES}
    for package, root in (
        ("cldr-annotations-full", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived"),
    ):
        for name, data in members(packages, package):
            language = Path(name).parent.name
            if name.endswith("/annotations.json") and language in annotations:
                annotations[language].update(json.loads(data)[root].get("annotations", {}))
    return annotations


def concept_json(entry: Mapping[str, Any], annotations: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return a concept's JSON: id, category, and for each language a name and keywords."""
    emoji = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
    names, keywords = {}, {}
    for language, by_emoji in annotations.items():
        # CLDR lists some emoji with, and some without, U+FE0F.
        annotation = by_emoji.get(emoji) or by_emoji[emoji.replace("\ufe0f", "")]
        names[language] = annotation["tts"][0]
        keywords[language] = annotation["default"]
    record = {
        "concept": concept_id(entry["unified"]),
        "category": entry["category"],
        "subcategory": entry["subcategory"],
        "name": names,
        "keywords": keywords,
    }
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


def encode_webp(image: Image.Image) -> bytes:
    """Encode as WebP, lossless except for the colors of fully transparent pixels."""
    out = io.BytesIO()
    image.save(out, "WEBP", lossless=True, quality=100, method=4)
    return out.getvalue()


def encode_image(data: bytes) -> bytes:
    """Encode an image as RGBA WebP of 64x64 pixels.

    The colors are reduced to at most 256, unless the file with all colors fills no more 512-byte
    blocks of the tar than the file with reduced colors.
    """
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    exact = encode_webp(image)
    # Not lossy WebP: it is larger, and has a lower peak signal-to-noise ratio (35 dB, not 38 dB).
    palette = encode_webp(image.quantize(256, method=Image.Quantize.FASTOCTREE).convert("RGBA"))
    return exact if -(-len(exact) // BLOCK) <= -(-len(palette) // BLOCK) else palette


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a tar whose bytes depend only on the names and contents of the files."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            info = tarfile.TarInfo(name)  # mtime 0, uid 0, gid 0, mode 0644, no owner names
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))


def build_corpus(packages: Path, out: Path) -> None:
    """Write the tars and SHA256SUMS. Raises ValueError if Pillow or a package is not as pinned."""
    if PIL.__version__ != PILLOW:
        raise ValueError(
            f"Pillow is {PIL.__version__}; expected {PILLOW}, which determines the bytes; "
            f"run `pip install pillow=={PILLOW}`"
        )
    verify(packages)
    images = {vendor: read_images(packages, vendor) for vendor in VENDORS}
    annotations = read_annotations(packages)
    (listing,) = [
        data
        for name, data in members(packages, "emoji-datasource-google")
        if name == "package/emoji.json"
    ]
    tars: dict[str, dict[str, bytes]] = {"seen.tar": {}, "heldout.tar": {}}
    for entry in json.loads(listing):
        concept = concept_id(entry["unified"])
        if not all(concept in images[vendor] for vendor in VENDORS):
            continue
        files = tars["heldout.tar" if is_held_out(entry["subcategory"]) else "seen.tar"]
        files[f"{concept}.json"] = concept_json(entry, annotations)
        for vendor in VENDORS:
            files[f"{concept}.{vendor}.webp"] = encode_image(images[vendor][concept])
    sums = []
    for name in sorted(tars):
        write_tar(out / name, tars[name])
        sums.append(f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n")
        print(f"{name}: {len(tars[name]) // 4} concepts, {(out / name).stat().st_size} bytes")
    (out / "SHA256SUMS").write_text("".join(sums))


def main() -> None:
    """Parse the command line and build the corpus."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--packages", type=Path, help="folder of downloaded .tgz packages; downloaded if unset"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder to write the tars to"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if args.packages is not None:
            build_corpus(args.packages, args.out)
            return
        with tempfile.TemporaryDirectory() as folder:
            fetch(Path(folder))
            build_corpus(Path(folder), args.out)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
