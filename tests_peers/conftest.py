"""Live comparisons with PyTorch peers, in an environment of their own (see the Makefile)."""

import jax
import torch

from benchmarks import peers

jax.config.update("jax_platforms", "cpu")
torch.manual_seed(0)
peers.torchvision()  # so that tests can import it, and what needs it
