"""Prints the released models: python -m piip_core.zoo."""

from __future__ import annotations

import argparse

from tabulate import tabulate

from ..checkpoints.released import recorded_size
from . import released_models


def main(argv: list[str] | None = None) -> None:
    """Prints name, data, published metric, size where it is known, and address of every released model."""
    argparse.ArgumentParser(prog="python -m piip_core.zoo", description=__doc__).parse_args(argv)
    rows = []
    for released in released_models():
        metrics = ", ".join(f"{name} {value}" for name, value in released.metrics.items())
        size = recorded_size(released)
        rows.append((released.name, released.data, metrics, f"{size / 1e9:.1f} GB" if size else "", released.url))
    print(tabulate(rows, ("name", "data", "published", "size", "address")))
    print("\nSizes are those of files that were fetched here before: nobody has published them.")


if __name__ == "__main__":
    main()
