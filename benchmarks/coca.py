"""Contrastive and captioning losses, joint and alone: all variants of configs/coca_emoji.py.

python benchmarks/coca.py [--seeds 3] [--output runs/coca]

Prints a Markdown table of means and standard deviations over seeds, with the median wall time of a
run, and writes it as JSON. A run that is already finished in the output folder is not repeated. All
variants share one feature cache.
"""

from variants import I2T, T2I, Column, build_parser, run_all

VARIANTS = ("both", "contrastive", "captioning")
COLUMNS = [
    Column("emoji_s", f"{I2T}@1", "S i→t R@1"),
    Column("emoji_s", f"{T2I}@1", "S t→i R@1"),
    Column("emoji_g", f"{I2T}@5", "G i→t R@5"),
    Column("emoji_f", f"{I2T}@5", "F i→t R@5"),
    Column("emoji_s_en", "exact_match", "S exact"),
    Column("emoji_s_en", "CIDEr", "S CIDEr-D", factor=1.0),
    Column("emoji_s_en", "chrF", "S chrF", factor=1.0),
    Column("emoji_g_en", "CIDEr", "G CIDEr-D", factor=1.0),
    Column("emoji_f_en", "CIDEr", "F CIDEr-D", factor=1.0),
]


def main() -> None:
    """Run all variants and print the table."""
    args = build_parser(__doc__, "runs/coca").parse_args()
    run_all("configs/coca_emoji.py", VARIANTS, args.seeds, COLUMNS, args.output)


if __name__ == "__main__":
    main()
