"""The command `generate`: what a text-to-image pipeline paints with an unlearned text tower."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cliperase_fast.errors import InputError

if TYPE_CHECKING:
    from cliperase_fast.evaluation.generation import Generation

EXAMPLES = """\
examples:
  cliperase-fast generate --pipeline sd-folder --after local-dir:runs/cat/model --judge ViT-B-32:openai \\
      --forget cat --neighbour dog --neighbour horse --neighbour tree --output pictures.html
  cliperase-fast generate ... the same ... --images 32 --steps 30 --json > pictures.json

The pipeline is a local folder that diffusers saved. --after is the CLIP whose text tower the pipeline was trained with,
unlearned. The same prompts and seeds are painted with the pipeline's own text encoder and with the unlearned one, and
the judge, a CLIP that stays as it was, names what it sees among the classes given.
"""


def add_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    parser.add_argument("--pipeline", required=True, metavar="DIR", help="a folder that diffusers saved")
    parser.add_argument("--after", required=True, metavar="MODEL", help="the unlearned CLIP, as --judge")
    parser.add_argument("--before", metavar="MODEL", help="the original (default: the pipeline's own text encoder)")
    parser.add_argument("--judge", required=True, metavar="MODEL", help=f"names what it sees: {model}")
    parser.add_argument(
        "--forget", required=True, action="append", metavar="CLASS", help="what was forgotten; may be repeated"
    )
    parser.add_argument(
        "--neighbour", action="append", default=[], metavar="CLASS", help="what must stay; may be repeated"
    )
    parser.add_argument(
        "--other-class", action="append", default=[], metavar="CLASS", help="one more that the judge may name"
    )
    parser.add_argument(
        "--template",
        default="a photo of a {}",
        metavar="TEXT",
        help="the prompt of a class (default: 'a photo of a {}')",
    )
    parser.add_argument("--images", type=int, default=8, metavar="N", help="pictures of each prompt (default: 8)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, metavar="X", help="guidance scale (default: the pipeline's)")
    parser.add_argument("--encoder", metavar="NAME", help="which text encoder to replace, of several: text_encoder_2")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="pictures at a time (default: 4)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--json", action="store_true", help="print all scores as JSON, for programs")
    parser.add_argument("--output", metavar="FILE", help="write scores and pictures there, as a page (.html)")


def generate(arguments: argparse.Namespace) -> int:
    from cliperase_fast.report.generation import generation_text, save_generation_page
    from cliperase_fast.storage import check_output_file

    if arguments.output:
        check_output_file(arguments.output, "--output=")
    if "{}" not in arguments.template:
        raise InputError(f"--template={arguments.template!r} has no {{}} for the class")
    both = next((name for name in arguments.neighbour if name in arguments.forget), None)
    if both is not None:
        raise InputError(f"{both!r} is given with --forget and with --neighbour: name it once")
    with contextlib.redirect_stdout(sys.stderr):  # libraries that are loaded print messages
        found = _compared(arguments)
    if arguments.output:  # before the text, whose reader may stop, as `| head` does
        save_generation_page(found, arguments.output, f"Pictures without {', '.join(arguments.forget)}")
    print(json.dumps(found.content, indent=2) if arguments.json else generation_text(found.content))
    if arguments.output and not arguments.json:
        print(f"\npictures {arguments.output}")
    return 0


def _compared(arguments: argparse.Namespace) -> Generation:
    from cliperase_fast.cli.commands import progress_style
    from cliperase_fast.evaluation.generation import Judge, compare_generation
    from cliperase_fast.evaluation.painting import encoder_name
    from cliperase_fast.models.runtime import pick_device

    device = pick_device(arguments.device)
    classes = list(dict.fromkeys([*arguments.forget, *arguments.neighbour, *arguments.other_class]))
    judge = Judge.zero_shot(arguments.judge, classes, (arguments.template,), device=str(device))
    pipeline = _load_pipeline(arguments.pipeline).to(device)
    own = getattr(pipeline, encoder_name(pipeline, arguments.encoder))
    encoders = [
        None if model is None else _text_encoder(model, hasattr(own, "text_projection"))
        for model in (arguments.before, arguments.after)
    ]
    options = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
    prompts = {name: arguments.template.replace("{}", name) for name in classes}
    return compare_generation(
        pipeline,
        encoders[1],
        judge,
        {prompts[name]: name for name in arguments.forget},
        {name: {prompts[name]: name} for name in arguments.neighbour},
        before=encoders[0],
        images=arguments.images,
        encoder=arguments.encoder,
        batch_size=arguments.batch_size,
        options={name: value for name, value in options.items() if value is not None},
        progress=progress_style(arguments) == "bars",
    )


def _load_pipeline(folder: str) -> Any:
    from cliperase_fast.extras import import_extra

    diffusers = import_extra("diffusers", "--pipeline")
    if not (Path(folder) / "model_index.json").is_file():
        raise InputError(f"--pipeline={folder} is not a folder that diffusers saved: it has no model_index.json")
    try:
        return diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, AttributeError, ImportError, RuntimeError) as error:
        raise InputError(f"--pipeline={folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _text_encoder(model: str, projection: bool) -> Any:
    from cliperase_fast import export
    from cliperase_fast.models import load_model

    return export.to_diffusers_text_encoder(load_model(model).module, projection=projection)
