from __future__ import annotations

import base64
import io
import re
from html import escape

import pytest
from audit_sample import sample_audit
from page_reader import KNOWN, Reader
from PIL import Image
from report_sample import EVIL, sample_result, sample_run

from cliperase_fast.evaluation import METRICS
from cliperase_fast.report import ReportData, html, rendering, verdict, write_html, write_plots
from cliperase_fast.report.html import page


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_html(sample_run(), tmp_path_factory.mktemp("run") / "deeper" / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def reader(written):
    return Reader(written)


def test_the_page_is_well_formed(reader):
    assert reader.open == []
    assert reader.tags[0][0] == "html"


def test_the_page_has_scores_settings_and_origin(reader):
    for expected in (
        "Forgetting demo#class:seven",
        "Forgotten, and the rest kept: the model now recognises 0.0% of the forget images",
        "Forget 36 pairs",
        "Zero-shot accuracy 98.0% 0.0% −98.0",
        "Association 0.700 0.690 −0.010",
        "Epoch 3 forgets the most of all.",
        "one image is 2.8 points",
        "seven forget 36 97.0% 0.0% −97.0",
        "learning_rate 0.0001",
        "demo#class:seven (120 training pairs)",
        "41.2 s in all, 2 h 0 min training",
        "torch 2.15.0",
        "Seed 17",
        "c0ffee",
    ):
        assert expected in reader.text, expected


def test_a_page_after_the_plots_is_the_same_and_draws_none_of_them_again(written, tmp_path, monkeypatch):
    drawn, draw_figure = [], rendering.draw_figure
    monkeypatch.setattr(rendering, "draw_figure", lambda *figure: drawn.append(figure) or draw_figure(*figure))
    run = sample_run()
    assert len(write_plots(run, tmp_path)) == len(drawn) == 4
    assert page(run) == written
    assert len(drawn) == 4 + 2 + 5  # the embeddings before and after, and the dark theme


def test_each_score_in_the_tables_is_explained(reader):
    for metric in METRICS.values():
        assert f"{metric.label} {metric.meaning}" in reader.text


def test_nothing_is_fetched_and_nothing_runs(written, reader):
    assert not re.search(r"https?://|//cdn|@import|url\(", written)
    assert reader.all("script") == reader.all("link") == reader.all("iframe") == reader.all("object") == []
    for _, attributes in reader.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href"):
                assert value.startswith("data:image/png;base64,")
    policies = [meta["content"] for meta in reader.all("meta") if "http-equiv" in meta]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_image_is_a_png_of_its_stated_size_in_both_themes(reader):
    images, twins = reader.all("img"), reader.all("source")
    assert len(images) == len(twins) == 5  # losses, similarities, map before, map after, classes
    for image, twin in zip(images, twins, strict=True):
        assert image["alt"]
        pictures = []
        for address in (image["src"], twin["srcset"]):
            with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as picture:
                picture.load()
                assert picture.format == "PNG"
                assert picture.size == (2 * int(image["width"]), 2 * int(image["height"]))
                pictures.append(picture.convert("L").resize((1, 1)).getpixel((0, 0)))  # its mean grey
        assert pictures[0] > 200
        assert pictures[1] < 80
        assert "dark" in twin["media"]


def test_all_text_from_the_run_is_escaped(no_drawing):
    result = sample_result()
    result["per_class"] = {
        EVIL: result["per_class"]["seven"],
        'a "quoted" & name': result["per_class"]["one"],
    }
    result["selection"]["reason"] = f"because {EVIL}"
    result["model"] = f"model {EVIL}"
    result["data"] = {**result["data"], "forget": EVIL, "retain": EVIL, "test": EVIL, "fingerprint": EVIL}
    result["data"]["skipped"] = {EVIL: {"count": 1, "example": EVIL}}
    result["config"] = {EVIL: EVIL}
    result["versions"] = {EVIL: EVIL}
    result["seed"] = EVIL
    for row in result["per_class"].values():
        row["set"] = row["set"] + EVIL
    text = page(sample_run(result, title=EVIL, embedding_labels=[EVIL] * 40))
    reader = Reader(text)
    assert reader.all("script") == []
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 14
    assert 'a "quoted" & name' in reader.text
    assert all(set(attributes) <= KNOWN for _, attributes in reader.tags)


@pytest.mark.parametrize(
    "run",
    [
        ReportData("nothing at all", {}),
        ReportData(
            "only empty parts",
            {"before": None, "after": {}, "per_class": None, "selection": None, "config": {}},
        ),
        sample_run(metrics=[], similarities={}, embeddings={}, embedding_sets=[], embedding_labels=[]),
        sample_run({**sample_result(), "per_class": {}}),
        sample_run({key: sample_result()[key] for key in ("before", "after")}, metrics=[], embeddings={}),
    ],
)
def test_missing_data_is_left_out_without_errors(run):
    reader = Reader(page(run))
    assert reader.open == []
    assert run.title in reader.text
    assert "None" not in reader.text
    assert "nan" not in reader.text.split()


def test_missing_scores_do_not_break_the_page(no_drawing):
    result = sample_result()
    for when in ("before", "after"):
        result[when]["retain"].update({name: None for name in result[when]["retain"] if name != "pairs"})
        result[when]["forget"]["zero_shot_top1"] = None
    reader = Reader(page(sample_run(result, metrics=[], similarities={}, embeddings={})))
    assert "Retain" in reader.text
    assert "finds the right caption of 10.0%" in reader.text


def test_the_page_has_the_verdict_of_the_terminal(no_drawing):
    result = sample_result((0.98, 0.97), (0.97, 0.97))
    result["notes"] = ["The weights are given back in <float32>"]
    text = page(ReportData("x", result))
    found = verdict(result)
    assert escape(found.sentence) in text and escape(found.advice) in text
    assert "<p>The weights are given back in &lt;float32&gt;.</p>" in text
    nothing = page(ReportData("x", sample_result((0.0, 0.0), (0.97, 0.97))))
    assert "<b>No result.</b> There was nothing to forget: the model already scored 0.0%" in nothing


def test_failure_is_stated_in_the_first_line(no_drawing):
    text = page(sample_run(sample_result((0.98, 0.97), (0.97, 0.5)), metrics=[], similarities={}, embeddings={}))
    assert '<p class="verdict bad"><b>Failure.</b> Not forgotten, and the rest suffered badly' in text


def test_skipped_items_are_counted_by_reason_with_an_example(no_drawing):
    result = sample_result()
    result["data"]["skipped"] = {
        "image cannot be decoded": {"count": 1000, "example": "image0.jpg"},
        "empty caption": {"count": 2, "example": "line 3"},
    }
    text = Reader(page(sample_run(result, metrics=[], similarities={}, embeddings={}))).text
    assert "1,000 x image cannot be decoded (the first: image0.jpg)" in text
    assert "2 x empty caption (the first: line 3)" in text


def test_class_names_break_at_spaces_and_inside_long_words_only(no_drawing):
    long = "n02099601_golden_retriever"
    names = ("sweet pepper", "ice_cream", long, "x" * 20)
    rows = {name: {"set": "retain", "pairs": 3, "before": 1.0, "after": 0.5} for name in names}
    text = page(sample_run({**sample_result(), "per_class": rows}))
    assert '<th scope="row">sweet pepper</th>' in text
    assert '<th scope="row">ice_cream</th>' in text
    assert '<th scope="row">n02099601_<wbr>golden_<wbr>retriever</th>' in text
    assert f'<th scope="row">{"x" * 14}<wbr>{"x" * 6}</th>' in text
    assert "tbody th { overflow-wrap" not in text


def test_a_phone_leaves_out_the_sets_and_pairs_of_classes(written):
    header = ['<th scope="col">class</th>', '<th scope="col" class="minor">set</th>',
              '<th scope="col" class="n minor">pairs</th>', '<th scope="col" class="n">before</th>']  # fmt: skip
    assert "".join(header) in written
    assert '<td class="minor">forget</td><td class="n minor">36</td><td class="n">97.0%</td>' in written
    assert ".minor { display: none; }" in written.partition("@media (max-width: 760px)")[2]


def test_the_caption_of_the_losses_speaks_of_weights_for_cliperase_alone(reader, no_drawing):
    other = {**sample_result(), "config": {"method": "gradient_ascent", "deepspeed": ""}}
    text = Reader(page(sample_run(other, similarities={}, embeddings={}))).text
    assert "weights (×)" in reader.text
    assert "weights (×)" not in text
    assert "deepspeed (none)" in text


def test_a_run_with_an_audit_links_to_it_and_shows_the_association_beside_its_references(reader, no_drawing):
    content = sample_audit()
    text = page(sample_run(metrics=[], embeddings={}, audit=content))
    audited = Reader(text)
    assert [link["href"] for link in audited.all("a")] == ["audit.html"]
    for said in content["verdicts"].values():
        assert said in audited.text
    for expected in (
        "After −0.400 [−0.450, −0.350] Before 0.400 [0.350, 0.450] Background level of the original 0.000",
        "Models that never saw the pairs −0.200 [−0.250, −0.150] (from −0.300 to −0.100)",
        "Over-forgotten The association of the forget pairs is −0.400",
        "The lines are what not knowing looks like",
    ):
        assert expected in audited.text, expected
        assert expected not in reader.text
    assert reader.all("a") == []
    assert audited.open == []


def test_an_audit_without_oracles_has_the_background_level_alone(no_drawing):
    content = sample_audit(oracles=0, over_forgotten=False, verdicts={"forgetting": EVIL})
    text = page(ReportData("x", sample_result(), audit=content))
    assert "Background level of the original" in text
    assert "never saw" not in text
    assert "Over-forgotten" not in text
    assert "<script" not in text


RECIPE = {
    "target": {"background": -0.08, "association": -0.03, "forget": 0.05},
    "probes": [
        {"rate": 1e-4, "steps": 30, "forget": 0.0, "association": -0.11, "divergence": 0.051, "reached": True,
         "stopped": ""},
        {"rate": 3.16228e-5, "steps": 10, "forget": 0.9, "association": 0.8, "divergence": 0.002, "reached": False,
         "stopped": "too slow"},
        {"rate": 1e-2, "steps": 12, "forget": None, "association": None, "divergence": None, "reached": False,
         "stopped": "not finite"},
    ],
    "learning_rate": 1e-4,
    "why": "it is the only rate that reaches the target within 30 steps",
    "lowered": [40, 50],
    "steps": 60,
    "stop": "the target was reached at step 30",
}  # fmt: skip


def test_a_run_without_numbers_shows_what_was_tried_and_where_it_ended(no_drawing):
    reader = Reader(page(sample_run({**sample_result(), "recipe": RECIPE})))
    for expected in (
        "association at most −0.030, 0.05 above their background level; forget score at most 5.0%",
        "0.0001: it is the only rate that reaches the target within 30 steps; lowered after step 40 and 50",
        "step 60: the target was reached at step 30",
        "0.0001 30 0.0% −0.110 0.051 at the target, chosen",
        "3.2e-05 10 90.0% 0.800 0.002 too slow",
        "0.01 12 – – – not finite",
        "The line is the target of the run",
    ):
        assert expected in reader.text
    for recipe in ({**RECIPE, "probes": []}, {"probes": [{}]}, None):
        Reader(page(sample_run({**sample_result(), "recipe": recipe})))
    assert "How the numbers were found" not in Reader(page(sample_run())).text


def test_a_single_pair_is_not_called_pairs(no_drawing):
    result = sample_result()
    for when in ("before", "after"):
        result[when]["forget"]["pairs"] = 1
    result["data"]["forget_pairs"] = 1
    text = html.page(sample_run(result))
    assert "1 pair" in text and "With 1 forget pair, one image is 100.0 points." in text and "(1 training pair)" in text
    assert not re.search(r">1 pairs|\b1 (forget|training) pairs", text)
