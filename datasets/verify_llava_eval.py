#!/usr/bin/env python3
"""Checks the files of the benchmarks of PIIP-LLaVA, and says everything that is wrong.

$ python datasets/verify_llava_eval.py all /data/eval              # the eight published benchmarks
$ python datasets/verify_llava_eval.py pope gqa /data/eval --decode full
$ python datasets/verify_llava_eval.py all /data/eval --report report.json

Questions, labels and images: missing or broken files, other numbers of questions than published, questions that are
asked twice, labels that do not belong to them. The exit status is 0 if everything is in order, 1 if something is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

from script_arguments import add_decode, add_report_options, check_report_options, errors_as_messages, new_parser, tell


def main(argv: list[str] | None = None) -> int:
    """Checks what the command line names, and returns the exit status."""
    parser = new_parser(__doc__)
    parser.add_argument("benchmarks", nargs="+", metavar="BENCHMARK", help="names as of llava_piip.eval, or all")
    parser.add_argument("root", type=Path, help="folder of all benchmarks")
    add_decode(parser)
    add_report_options(parser)
    args = parser.parse_args(argv)
    check_report_options(parser, args)
    # Loads torch and transformers: not for --help
    from llava_piip.eval import find_benchmarks
    from llava_piip.eval.data_check import check_benchmarks

    with errors_as_messages():
        benchmarks = find_benchmarks(args.benchmarks)
        return tell(check_benchmarks(benchmarks, args.root, decode=args.decode, workers=args.workers), args)


if __name__ == "__main__":
    sys.exit(main())
