"""Train: `python train.py --config=configs/lit_emoji.py --workdir=runs/mine [--config.key=value]`."""

from imgtune_jax.cli import train

if __name__ == "__main__":
    train()
