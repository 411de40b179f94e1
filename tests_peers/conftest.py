"""Live comparisons with PyTorch peers, in a separate environment (see the Makefile)."""

import jax
import torch

from benchmarks import peers

jax.config.update("jax_platforms", "cpu")
torch.manual_seed(0)
peers.torchvision()  # so that tests, and libraries that need it, can import it
