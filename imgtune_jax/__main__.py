"""`python -m imgtune_jax`: the same as the command `imgtune`."""

from imgtune_jax.cli import main

if __name__ == "__main__":
    main()
