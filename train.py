"""Train a model: `python train.py --config=FILE.py --workdir=DIR [--config.key=value]`."""

from imgtune_jax.cli import train

if __name__ == "__main__":
    train()
