"""The command `select`: find pairs by a question to the model, and write their ids."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from cliperase_fast.errors import InputError

EXAMPLES = """\
examples:
  cliperase-fast select --model ViT-B-32:openai --data folder:/photos --query 'photos of a red car' --k 200 \\
      --output red-cars.txt
  cliperase-fast select --model local-dir:my-clip --data 'csv:/data/pairs.csv' --like car1.jpg --like car2.jpg \\
      --threshold 0.8 --features car.features --output red-cars.txt
  cliperase-fast unlearn ... --forget ids:red-cars.txt

Look at the page beside the file of ids (red-cars.html) before anything is forgotten. With --features a second query
over the same data opens a few images only.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, metavar="SOURCE", help="where the pairs come from, see below")
    parser.add_argument("--query", action="append", default=[], metavar="TEXT", help="what to find; may be repeated")
    parser.add_argument("--like", action="append", default=[], metavar="FILE", help="an example image; may be repeated")
    parser.add_argument("--k", type=int, metavar="N", help="find the N most similar pairs")
    parser.add_argument("--threshold", type=float, metavar="X", help="find pairs of at least this cosine")
    parser.add_argument("--features", metavar="FILE", help="keep the image features there for further queries")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the file of ids; the page is beside it (.html)"
    )


def select(arguments: argparse.Namespace) -> int:
    from cliperase_fast.cli.commands import progress_style
    from cliperase_fast.data import parse_reference
    from cliperase_fast.plurals import counted
    from cliperase_fast.querying import select_by_query
    from cliperase_fast.report.wording import left_out_lines
    from cliperase_fast.storage import check_output_file

    output = Path(arguments.output)
    check_output_file(output, "--output=")
    sheet = output.with_suffix(".html")
    if sheet == output:
        raise InputError(f"--output={output} is for the ids, and a page of that name is written too: give a .txt file")
    if arguments.features:
        _keep_features_apart(Path(arguments.features), output, sheet)
    check_output_file(sheet, "the page beside --output=")
    query: list[Any] = [*arguments.query, *map(Path, arguments.like)]
    if not query:
        raise InputError("say what to find: give --query TEXT or --like FILE")
    found = select_by_query(
        arguments.model,
        arguments.data,
        query,
        k=arguments.k,
        threshold=arguments.threshold,
        features=arguments.features,
        on_error=arguments.on_error,
        batch_size=arguments.batch_size,
        device=arguments.device,
        precision=arguments.precision,
        progress=progress_style(arguments) == "bars",
    )
    found.save_ids(output)
    found.save_sheet(sheet)
    values = found.similarities[found.rows]
    print(
        f"found    {len(found)} of {len(found.pairs)} pairs, with a similarity of {values[-1]:.3f} to {values[0]:.3f}"
    )
    if found.also:
        print(f"         and {counted(len(found.also), 'test pair')} as similar")
    for line in left_out_lines(found.skipped):
        print(f"left out {line}")
    source = parse_reference(arguments.data)[0]
    following = shlex.join(["--model", arguments.model, "--data", source, "--forget", f"ids:{output}"])
    print(f"ids      {output}\npictures {sheet}\nnext     cliperase-fast unlearn {following} --output DIR")
    return 0


def _keep_features_apart(features: Path, *written: Path) -> None:
    """Raise InputError if the file of features, or the note beside it, is a file that is written after it."""
    own = {os.path.realpath(file) for file in (features, features.with_suffix(".json"))}
    taken = next((file for file in written if os.path.realpath(file) in own), None)
    if taken is not None:
        raise InputError(f"--features={features} and {taken}, which --output writes, are one file: give another name")
