"""Make interop_resnet.npz: outputs of torchvision's ResNet with weights sampled by NumPy.

    pip install -r tests_peers/requirements.txt && python -m tests.golden.interop_resnet

The file was made with torchvision 0.28.0. It has the names and shapes of the weights, and the
outputs; the tests sample the same weights.
"""

import json
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("interop_resnet.npz")
STAGE_SIZES = (1, 2, 1, 1)
NUM_CLASSES = 5


def sample_state_dict(shapes, seed=0):
    """Sample a state dict of {name: shape} such that activations neither vanish nor explode."""
    rng, state = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = np.zeros((), np.int64)
        elif name.endswith("running_var"):
            state[name] = rng.uniform(0.5, 2.0, shape).astype(np.float32)
        elif len(shape) == 1:
            center = 1.0 if name.endswith("weight") else 0.0
            state[name] = rng.normal(center, 0.2, shape).astype(np.float32)
        else:
            fan_in = int(np.prod(shape[1:]))
            state[name] = rng.normal(0, fan_in**-0.5, shape).astype(np.float32)
    return state


def sample_images(n=2, size=37, seed=1):
    """Sample images [n h w c]. The odd size distinguishes symmetric padding from "SAME"."""
    return np.random.default_rng(seed).normal(size=(n, size, size, 3)).astype(np.float32)


def build_torchvision_model():
    import torch

    from benchmarks import peers

    resnet = peers.torchvision().models.resnet
    model = resnet.ResNet(resnet.Bottleneck, list(STAGE_SIZES), num_classes=NUM_CLASSES).eval()
    shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
    state = {name: torch.from_numpy(x) for name, x in sample_state_dict(shapes).items()}
    model.load_state_dict(state)
    return model, shapes


def main():
    import torch

    model, shapes = build_torchvision_model()
    image = torch.from_numpy(sample_images().transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        logits = model(image).numpy()
        model.fc = torch.nn.Identity()
        pooled = model(image).numpy()
    np.savez_compressed(GOLDEN, shapes=json.dumps(shapes), logits=logits, pooled=pooled)


if __name__ == "__main__":
    main()
