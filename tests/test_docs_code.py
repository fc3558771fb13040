"""The code of README.md and docs/*.md: Python is run, page by page, and commands are read by the real parser.

The pages name models and data that are not here. `STAND_INS` says what takes their place: a tiny model with random
weights, and a few small pictures. Settings that a page leaves to the package are those of a run of two steps, so these
tests show that the code works as written, not that anything is forgotten.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from markdown_it import MarkdownIt
from PIL import Image

import cliperase_fast as cf
from cliperase_fast import demo
from cliperase_fast.cli.parser import make_parser
from cliperase_fast.cli.settings import given_settings
from cliperase_fast.ledger import Ledger
from cliperase_fast.models import load_model
from cliperase_fast.unlearning.methods import registry

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = {
    name: [token for token in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8"))
           if token.type in ("fence", "code_block")]
    for name, path in PAGES.items()
}  # fmt: skip
PYTHON = {
    name: blocks for name, tokens in BLOCKS.items()
    if (blocks := [token.content for token in tokens if token.info == "python"])
}  # fmt: skip
STAND_INS = {
    '"ViT-B-32:openai"': '"local-dir:base"',
    "cifar100:/data": "folder:photos",
    "folder:/photos": "folder:photos",
    "folder:/data/people": "folder:photos",
    "folder:/data": "folder:photos",
    "folder:/food": "folder:food",
    "demo#class:seven": "folder:photos#class:cat",
    "coco:/data/coco": "folder:neutral",
    "csv:/people/": "csv:",
    '"personas#': '"personas?people=12&train=2&test=2&size=16#',
    "class:person 0* phone": "class:person 0[0-4] phone",
    "depth=True": "depth=False",  # attacks take a minute
    "batch_size=65536, grad_cache_chunk=256": "batch_size=12, grad_cache_chunk=4",
}
QUICK = {"steps": 2, "batch_size": 8, "learning_rate": 1e-3}
NEEDS_RUN = {"audit.md": "runs/cat/model"}  # what an earlier page made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and pictures, by the names that the pages use or that take their place."""
    folder = tmp_path_factory.mktemp("docs")
    for seed, name in enumerate(("base", "without-cats-1", "without-cats-2", "without-cats-3")):
        load_model(_tiny_clip(seed)).save(folder / name)
    rng = np.random.default_rng(0)
    classes = {"photos": ("apple", "cat", "dog", "jane doe"), "neutral": ("a car", "a tree"), "food": ("bread", "rice")}
    for collection, names in classes.items():
        for number, name in enumerate(names):
            (folder / collection / name).mkdir(parents=True)
            for index in range(10):
                pixels = (60 * number + rng.integers(0, 60, (16, 16, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / collection / name / f"{index}.png")
    for table, captions in {"forget": ["the number is 1"], "keep": ["a carpenter", "the number is 2"]}.items():
        rows = [f"photos/cat/{index}.png\t{captions[index % len(captions)]}" for index in range(10)]
        (folder / f"{table}.tsv").write_text("filepath\ttitle\n" + "\n".join(rows) + "\n")
    return folder


def _tiny_clip(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return open_clip.model.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
            text_cfg={"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        ).eval()


class Pipeline:
    """Called like a diffusers pipeline; it paints noise."""

    def __init__(self, model):
        self.text_encoder = cf.export.to_diffusers_text_encoder(model)

    def __call__(self, prompt, generator, output_type, num_inference_steps):
        images = [torch.rand(16, 16, 3, generator=each).numpy() for each in generator]
        return SimpleNamespace(images=np.stack(images[: len(prompt)]))


@pytest.fixture
def page_folder(folder, tmp_path, monkeypatch):
    """The working folder of a page."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def short_runs(page_folder, monkeypatch):
    """Fill in the settings of a short run where a page gives none; a page's own arguments are passed on as they are."""
    unlearn, forget = cf.unlearn, Ledger.forget

    def short(method, given):
        trains = method not in ("text_projection", "drop_direction")
        return {**(QUICK if trains else {}), "report": False, "progress": False, **given}

    def short_unlearn(*arguments, **given):
        return unlearn(*arguments, **short(given.get("method"), given))

    def short_forget(self, *arguments, **given):
        given = short(given.get("method"), given)
        del given["report"]
        return forget(self, *arguments, **given)

    monkeypatch.setattr(cf, "unlearn", short_unlearn, raising=False)
    monkeypatch.setattr(Ledger, "forget", short_forget)
    monkeypatch.setattr(demo, "cached_small_clip", lambda spec, recipe: page_folder / "base")
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


@pytest.fixture
def one_rank(monkeypatch):
    """The environment that torchrun sets for a single process."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

    def start():
        for name, value in ranks.items():
            monkeypatch.setenv(name, value)

    yield start
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def names(page_folder):
    """What a page may use without defining it: the usual imports, a model with pairs, and the features of a batch."""

    def features(rows):
        return F.normalize(torch.randn(rows, 16), dim=1).requires_grad_()

    def pairs(name):
        paths = sorted((page_folder / "photos" / name).glob("*.png"))
        return [(Image.open(path), f"a photo of a {name}") for path in paths]

    model = _tiny_clip()
    student = {f"{part}_{kind}": features(4) for part in ("forget", "retain") for kind in ("image", "text")}
    joint = {"image_features": features(8), "text_features": features(8)}
    return {
        "__name__": "a page of the docs", "cf": cf, "torch": torch, "logging": logging, "pipeline": Pipeline(model),
        "model": model, "open_clip_model": model, "forget": pairs("cat"), "retain": pairs("dog"), "data": pairs("dog"),
        **student, **joint, "scale": 10.0, "teacher_scale": 10.0, "logit_scale": 10.0, "teacher_logit_scale": 10.0,
        "forget_mask": torch.arange(8) < 3, "class_ids": torch.arange(8),
    }  # fmt: skip


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs(page, page_folder, short_runs, one_rank, monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    if "init_process_group()" in "".join(PYTHON[page]):
        one_rank()
    if page in NEEDS_RUN:
        shutil.copytree("base", NEEDS_RUN[page])
    namespace = names(page_folder)
    rows = 8 if page == "guide.md" else 4
    namespace |= {f"teacher_{kind}": F.normalize(torch.randn(rows, 16), dim=1) for kind in ("image", "text")}
    for number, source in enumerate(PYTHON[page], 1):
        for shown, used in STAND_INS.items():
            source = source.replace(shown, used)
        exec(compile(source, f"{page}, block {number}", "exec", dont_inherit=True), namespace)


def test_every_stand_in_takes_the_place_of_something():
    everything = "\n".join(source for blocks in PYTHON.values() for source in blocks)
    assert [shown for shown in STAND_INS if shown not in everything] == []


def commands_of(token):
    """The lines of a shell block, without comments and prompts; lines that end in a backslash go on in the next one."""
    text = token.content.replace("\\\n", " ")
    if token.info == "diff":
        text = "\n".join(line[1:] for line in text.splitlines() if line.startswith("+"))
    for line in text.splitlines():
        inner = re.search(r"\$\((cliperase-fast [^)]*)\)", line)
        line = inner[1] if inner else line
        if re.match(r"(cliperase-fast|torchrun|deepspeed|make) |python -m benchmarks", line):
            yield shlex.split(line, comments=True)


COMMANDS = [
    (page, words)
    for page, tokens in BLOCKS.items()
    for token in tokens
    if token.info in ("", "bash", "diff")
    for words in commands_of(token)
]
OURS = [(page, words) for page, words in COMMANDS if words[0] in ("cliperase-fast", "torchrun", "deepspeed")]


def arguments_of(words):
    """The arguments of `cliperase-fast` in a command, launchers included; and whether "..." stands for some of them."""
    if words[0] != "cliperase-fast":
        words = words[words.index("cliperase_fast.cli") :]
    words = words[1 : words.index(">")] if ">" in words else words[1:]
    return [word for word in words if word != "..."], "..." in words


def parsers_of(parser):
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers_of(inner)


@pytest.mark.parametrize(("page", "words"), OURS, ids=[f"{page}-{' '.join(words)[:60]}" for page, words in OURS])
def test_a_command_of_the_docs_is_accepted(page, words, capsys):
    arguments, shortened = arguments_of(words)
    parser = make_parser()
    if shortened:
        for inner in parsers_of(parser):
            for action in inner._actions:
                action.required = action.required and isinstance(action, argparse._SubParsersAction)
                if not action.option_strings and action.nargs is None:
                    action.nargs = "?"
    try:
        found = parser.parse_args(arguments)
    except SystemExit as ended:
        if ended.code == 0:  # --help
            return
        pytest.fail(f"{' '.join(words)}\n{capsys.readouterr().err}")
    if found.command == "bench":
        module = importlib.import_module(f"cliperase_fast.benchmarks.{found.what}")
        if hasattr(module, "parser"):
            module.parser().parse_args(found.arguments)
    elif hasattr(found, "method") or found.command in ("unlearn", "demo", "compare"):
        settings = {name: value for name, value in given_settings(without_files(found)).items() if name != "method"}
        cf.UnlearnConfig.from_dict({**settings, "method": getattr(found, "method", "cliperase")})


def without_files(found):
    found.config = None
    return found


def test_the_targets_of_make_in_the_docs_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()) | {"clean"}
    named = {words[1] for page, words in COMMANDS if words[0] == "make"}
    assert named and named <= targets


def test_the_benchmarks_in_the_docs_exist():
    named = {words[2].partition(".")[2] for page, words in COMMANDS if words[:2] == ["python", "-m"]}
    assert named and {name for name in named if not (ROOT / "benchmarks" / f"{name}.py").is_file()} == set()


def test_the_names_in_the_diffs_exist():
    lines = [line for page, tokens in BLOCKS.items() for token in tokens if token.info == "diff"
             for line in token.content.splitlines() if line.startswith("+")]  # fmt: skip
    used = {name for line in lines for name in re.findall(r"\bcf\.(\w+)", line)}
    assert used and used <= set(cf.__all__)
    for line in lines:
        if line.startswith("+from "):
            exec(line[1:], {})


def test_a_page_of_the_site_is_in_its_navigation_and_links_to_pages_that_exist():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for name, path in PAGES.items():
        if name != "README.md":
            assert f": {name}\n" in navigation, name
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / link).exists(), f"{name}: {link}"


def test_the_page_of_commands_names_those_that_print_json():
    page = PAGES["command-line.md"].read_text(encoding="utf-8")
    sentence = next(line for line in page.splitlines() if "print JSON with `--json`" in line)
    commands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    printing = {name for name, parser in commands.items() if "--json" in parser._option_string_actions}
    assert set(re.findall(r"`([a-z]+)`", sentence.partition(" print JSON")[0])) == printing


def test_every_environment_variable_is_on_the_page_of_the_command_line():
    source = "".join(path.read_text(encoding="utf-8") for path in Path(cf.__file__).parent.rglob("*.py"))
    table = re.findall(r"^\| `(CLIPERASE_[A-Z_]+)` \|", PAGES["command-line.md"].read_text(encoding="utf-8"), re.M)
    assert set(table) == set(re.findall(r'"(CLIPERASE_[A-Z_]+)"', source))
