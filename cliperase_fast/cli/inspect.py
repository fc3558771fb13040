"""The command `inspect`: look at data before anything is trained."""

from __future__ import annotations

import argparse
import json

EXAMPLES = """\
examples:
  cliperase-fast inspect --data folder:/photos
  cliperase-fast inspect --data folder:/photos --forget class:cat --output inspection.html

Nothing is trained or changed. Pairs that cannot be used are counted, and the first of them are named.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="SOURCE", help="what to look at, see below")
    parser.add_argument("--forget", metavar="SELECTOR", help="show what this selects and what is left apart")
    parser.add_argument("--retain", default="rest", metavar="SELECTOR", help="which to keep (default: all others)")
    parser.add_argument("--test", "--test-data", dest="test_data", metavar="SOURCE", help="where to measure")
    parser.add_argument(
        "--images", type=int, default=10_000, metavar="N", help="images to read of each set at most (default: 10000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sources and samples (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON, for programs")
    parser.add_argument("--output", metavar="FILE", help="write them with pictures there, as a page (.html)")


def inspect(arguments: argparse.Namespace) -> int:
    from cliperase_fast.cli.commands import progress_style
    from cliperase_fast.inspecting import inspect_data
    from cliperase_fast.storage import check_output_file

    if arguments.output:
        check_output_file(arguments.output, "--output=")
    found = inspect_data(
        arguments.data,
        arguments.forget,
        retain=arguments.retain,
        test=arguments.test_data,
        images=arguments.images,
        seed=arguments.seed,
        progress=progress_style(arguments) == "bars",
    )
    if arguments.output:  # before the text, whose reader may stop, as `| head` does
        found.save_sheet(arguments.output)
    print(json.dumps(found.content, indent=2) if arguments.json else found.text())
    if arguments.output and not arguments.json:
        print(f"\npictures {arguments.output}")
    return 0
