"""The model card: its front matter, its numbers, and names that must not break it."""

import re
import shlex

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from report_sample import EVIL, sample_result

from cliperase_fast import UnlearnConfig
from cliperase_fast.cli.parser import make_parser
from cliperase_fast.reading import printable
from cliperase_fast.report import audit_advice, model_card, verdict

INPUTS = {
    "model": "local-dir:somewhere", "forget": "demo#class:seven", "retain": "rest", "test": None, "own_test": False,
    "templates": [],
}  # fmt: skip


def result_of_run(inputs=None, **changes):
    result = sample_result()
    result |= {
        "library": "open_clip",
        "method": {"name": "cliperase", "summary": "three losses together", "source": "CLIPErase"},
        "inputs": {**INPUTS, **(inputs or {})},
        "config": UnlearnConfig(learning_rate=1e-4, lambda_forget=2.5, method_options={"alpha": 3}).to_dict(),
        "notes": [],
        "versions": {"cliperase_fast": "9.8.7"},
        "audit": None,
        "recipe": None,
    }
    return {**result, **changes}


def card_of(result):
    return model_card(result, "run/model", "run")


def rows(card):
    """The cells of all table rows, split at pipes that are not escaped."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def parse(markdown):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)


def test_the_card_has_the_front_matter_of_a_hub_model():
    card = ModelCard(card_of(result_of_run(inputs={"model": "hf-hub:org/name"})))
    assert card.data.library_name == "open_clip"
    assert card.data.base_model == "org/name"
    assert "machine-unlearning" in card.data.tags
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    plain = ModelCard(card_of(result_of_run(library="generic"))).data
    assert plain.library_name is plain.base_model is None


def test_the_card_has_what_how_and_the_scores():
    result = result_of_run()
    card = card_of(result)
    assert card.splitlines().count("# Unlearned CLIP model: seven") == 1
    assert verdict(result).sentence in card
    table = rows(card)
    assert ["forget", "demo#class:seven", "120"] in table
    assert ["retain", "rest", "1,100"] in table
    assert ["learning\\_rate", "0.0001"] in table
    assert ["lambda\\_forget", "2.5"] in table
    assert ["method\\_options: alpha", "3"] in table
    assert "lambda\\_retain" not in card, "a setting at its default"
    assert ["Zero-shot accuracy", "98.0%", "0.0%", "97.0%", "96.5%"] in table
    assert ["pairs", "36", "36", "324", "324"] in table
    assert "`cliperase_fast` 9.8.7" in card
    assert "one image is 2.8 points" in card
    assert "The licence of the original model applies." in card


def test_the_card_has_what_an_automatic_run_found():
    result = result_of_run(config=UnlearnConfig().to_dict(), recipe={"learning_rate": 3e-4, "steps": 70})
    table = rows(card_of(result))
    assert ["learning\\_rate", "auto: 0.0003"] in table
    assert ["epochs", "auto: 70 steps"] in table


def test_the_card_shows_a_given_number_of_steps_in_place_of_epochs():
    config = UnlearnConfig(steps=50, learning_rate=1e-4).to_dict()
    names = dict(row[:2] for row in rows(card_of(result_of_run(config=config))))
    assert names["steps"] == "50" and "epochs" not in names


def test_without_an_audit_the_card_has_the_command_that_makes_one():
    card = card_of(result_of_run())
    assert "No audit was made" in card
    assert "\ncliperase-fast audit --before local-dir:somewhere --after local-dir:run/model" in card
    audited = {"verdicts": {"forgetting": "It is gone.", "gap": "Near | the oracles."}, "over_forgotten": False}
    card = card_of(result_of_run(audit=audited))
    assert "No audit was made" not in card
    assert "\n- It is gone.\n- Near \\| the oracles.\n" in card


NAMES = [
    EVIL, "a|b", "`rm`", "two\nlines\n---\n# big", "```\nx", "*_[x](y)_*", "![x](y)", "a: b", "# a", "é\udcff", "&lt;",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_cannot_break_the_card(name):
    result = result_of_run(inputs={"model": f"hf-hub:{name}", "forget": f"demo#class:{name}"}, notes=[name])
    result["per_class"][name] = result["per_class"].pop("seven")
    result["data"]["forget"] = name
    result["config"]["trainable"] = name
    result["versions"]["cliperase_fast"] = "1"
    card = card_of(result)
    card.encode("utf-8")
    front, body = card.split("\n---\n", 1)
    found = yaml.safe_load(front)
    assert set(found) == {"tags", "pipeline_tag", "library_name", "base_model"} and "\n" not in found["base_model"]
    blocks = parse(body)
    plain = parse(card_of(result_of_run(notes=["x"])).split("\n---\n", 1)[1])
    assert [block.type for block in blocks if block.level == 0] == [block.type for block in plain if block.level == 0]
    shown = printable(" ".join(name.split()))
    (title,) = (blocks[at + 1] for at, block in enumerate(blocks) if block.tag == "h1" and block.nesting == 1)
    assert title.children[0].content == f"Unlearned CLIP model: {shown}"
    cells = ["".join(child.content for child in block.children) for block in blocks if block.type == "inline"]
    assert cells.count(shown) == 2, "as the forget set and as a setting, alone in their cells"
    inside = {child.type for block in blocks for child in block.children or ()}
    assert inside <= {"text", "text_special", "softbreak", "code_inline"}
    (command,) = (block.content for block in blocks if block.type == "fence" and "audit" in block.content)
    assert f"class:{printable(name)}" in shlex.split(command)


@pytest.mark.parametrize(
    ("library", "inputs", "settings"),
    [
        ("open_clip", {}, {}),
        (
            "transformers",
            {"model": "/models/it's mine", "forget": "folder:/a b#class:hot dog,cat"},
            {"seed": 3, "on_error": "skip", "test_fraction": 0.4},
        ),
        ("open_clip", {"retain": "demo#class:one", "test": "shapes", "own_test": True, "templates": ["a {}"]}, {}),
    ],
)
def test_the_advised_command_is_one_that_the_command_line_takes(library, inputs, settings):
    result = result_of_run(inputs=inputs, library=library)
    result["config"].update(settings)
    words = shlex.split(audit_advice(result, "my run/model", "my run"))
    assert words[:2] == ["cliperase-fast", "audit"]
    given, found = {**INPUTS, **inputs}, make_parser().parse_args(words[1:])
    assert found.before == given["model"]
    assert found.after == ("local-dir:" if library == "open_clip" else "") + "my run/model"
    assert f"{found.data}#{found.forget}" == given["forget"]
    assert found.retain == given["retain"].rpartition("#")[2]
    assert (found.test_data, found.output) == (given["test"], "my run")
    assert found.test_fraction == settings.get("test_fraction", 0.2)
    assert (found.seed, found.on_error) == (settings.get("seed", 0), settings.get("on_error", "raise"))
    assert found.template == (given["templates"] or None)


@pytest.mark.parametrize(
    ("changes", "call"),
    [
        ({"inputs": {"model": None}}, "audit(before, 'local-dir:m', 'demo#class:seven', 'rest')"),
        ({"inputs": {"forget": None, "retain": None}}, "audit('local-dir:somewhere', 'local-dir:m', forget, retain)"),
        ({"inputs": {"own_test": True}}, "'rest', test=test)"),
        ({"inputs": {"retain": "shapes"}}, "'demo#class:seven', 'shapes')"),
        (
            {"inputs": {"model": None}, "config": UnlearnConfig(seed=2, test_fraction=0.3).to_dict()},
            "'rest', seed=2, test_fraction=0.3)",
        ),
        ({"library": "generic"}, "audit('local-dir:somewhere', after, 'demo#class:seven', 'rest')"),
    ],
    ids=str,
)
def test_runs_that_flags_cannot_name_are_audited_from_python(changes, call):
    assert audit_advice(result_of_run(**changes), "m").endswith(call)
