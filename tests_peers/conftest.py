"""Comparisons with installed PyTorch codebases, in a separate environment (see the Makefile).

In these tests, `theirs` is a model of the other codebase, and `ours` is a model of this project.
"""

import jax
import torch

from benchmarks import peers

jax.config.update("jax_platforms", "cpu")
torch.manual_seed(0)
peers.torchvision()  # Import it here, so that later imports of it work too.
