"""Effect of locking: all variants of configs/locking_emoji.py, with several seeds.

python benchmarks/locking.py [--seeds 3] [--full] [--output runs/locking]

Prints a Markdown table of means and standard deviations over seeds, with the median wall time of a
run, and writes it as JSON. A run that is already finished in the output folder is not repeated.
With --full, runs have as many steps as the demo.

Test sets: S has the training concepts by an artist who is not in the training set, G has held-out
concepts by an artist of the training set, and F has held-out concepts by the other artist.
"""

from variants import I2T, T2I, Column, build_parser, run_all

VARIANTS = ("locked", "unlocked", "scratch")
COLUMNS = [
    Column("emoji_s", f"{I2T}@1", "S i→t R@1"),
    Column("emoji_s", f"{T2I}@1", "S t→i R@1"),
    Column("emoji_g", f"{I2T}@5", "G i→t R@5"),
    Column("emoji_g", f"{T2I}@5", "G t→i R@5"),
    Column("emoji_f", f"{I2T}@5", "F i→t R@5"),
    Column("emoji_f", f"{T2I}@5", "F t→i R@5"),
]


def main() -> None:
    """Run all variants and print the table."""
    parser = build_parser(__doc__, "runs/locking")
    parser.add_argument(
        "--full", action="store_true", help="runs as long as the demo; an hour per seed"
    )
    args = parser.parse_args()
    variants = [f"{variant}-full" for variant in VARIANTS] if args.full else VARIANTS
    run_all("configs/locking_emoji.py", variants, args.seeds, COLUMNS, args.output)


if __name__ == "__main__":
    main()
