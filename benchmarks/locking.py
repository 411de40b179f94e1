"""How much locking helps: all arms of configs/locking_emoji.py, several seeds.

python benchmarks/locking.py [--seeds 3] [--full] [--output runs/locking]

Prints a Markdown table of means and standard deviations over seeds, with the median wall time of a
run, and writes it as JSON. A finished run is not run again. --full: as long as the demo.
"""

from variants import I2T, T2I, Column, arguments, run_all

ARMS = ("locked", "unlocked", "scratch")
COLUMNS = [
    Column("emoji_s", f"{I2T}@1", "S i→t R@1"),
    Column("emoji_s", f"{T2I}@1", "S t→i R@1"),
    Column("emoji_g", f"{I2T}@5", "G i→t R@5"),
    Column("emoji_g", f"{T2I}@5", "G t→i R@5"),
    Column("emoji_f", f"{I2T}@5", "F i→t R@5"),
    Column("emoji_f", f"{T2I}@5", "F t→i R@5"),
]


def main() -> None:
    """Run all arms and print the table."""
    parser = arguments(__doc__, "runs/locking")
    parser.add_argument("--full", action="store_true", help="the demo's size; an hour a seed")
    o = parser.parse_args()
    arms = [f"{arm}-full" for arm in ARMS] if o.full else ARMS
    run_all("configs/locking_emoji.py", arms, o.seeds, COLUMNS, o.output)


if __name__ == "__main__":
    main()
