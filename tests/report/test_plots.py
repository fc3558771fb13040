from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from report_sample import sample_result, sample_run

from cliperase_fast.report import drawing, plots, write_plots

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_plots(sample_run(), tmp_path_factory.mktemp("run") / "plots")


def test_four_nonempty_pngs_are_written(written):
    assert [path.name for path in written] == [
        "losses.png",
        "per_class.png",
        "similarities.png",
        "embeddings.png",
    ]
    for path in written:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width >= 1000
            colours = image.convert("RGB").getcolors(1 << 24)
        assert len(colours) > 8
        assert max(colours)[1] == (255, 255, 255)


def test_forget_and_retain_have_their_own_colours(written):
    for path in written[1:]:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
        for colour in (drawing.LIGHT.forget, drawing.LIGHT.retain):
            rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert (np.abs(pixels - rgb).sum(1) < 24).sum() > 50, (path.name, colour)


def test_drawing_leaves_matplotlibs_global_state_alone(tmp_path):
    code = """
import sys
from report_sample import sample_run
import cliperase_fast.report as report
assert "matplotlib" not in sys.modules, "only drawing may load it"
import matplotlib
def settings():  # without "backend": reading it loads pyplot
    return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = settings()
report.write_plots(sample_run(), sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
assert settings() == before
"""
    path = [p for p in sys.path if p.endswith("report")] + [p for p in sys.path if p]
    environment = {"PYTHONPATH": ":".join(path), "PATH": ""}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metrics": []}, {"per_class", "similarities", "embeddings"}),
        ({"similarities": {}, "embeddings": {}}, {"losses", "per_class"}),
        ({"result": {}}, {"losses", "similarities", "embeddings"}),
        ({"metrics": [], "similarities": {}, "embeddings": {}, "result": {}}, set()),
    ],
)
def test_a_plot_without_data_is_left_out(tmp_path, changes, expected):
    assert {path.stem for path in write_plots(sample_run(**changes), tmp_path)} == expected


def drawn(name, **changes):
    return plots.FIGURES[name](sample_run(**changes), drawing.DARK)


def texts(figure):
    """Everything written on the figure."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_losses_show_the_terms_their_weights_the_chosen_step_and_the_validation():
    written = texts(drawn("losses"))
    for expected in (
        "Total loss",
        "Forgetting  ×3",
        "Retention",
        "Consistency",
        "Learning rate",
        "Validation score",
    ):
        assert expected in written
    assert "chosen" in written
    assert {"forget", "retain"} <= set(written)


def test_losses_show_the_terms_that_the_method_recorded():
    line = {"step": 1, "epoch": 0, "total": 1.0, "forget": 2.0, "learning_rate": 1e-4, "grad_norm": 1.0}
    few = texts(drawn("losses", metrics=[line, {**line, "step": 2}]))
    assert "Forgetting  ×3" in few
    assert not {"Retention", "Consistency", "not recorded", "Grad norm"} & set(few)
    other = {"step": 1, "total": 1.0, "retain": 2.0, "weight_anchor": 3.0, "learning_rate": 1e-4}
    figure = drawn("losses", metrics=[other, {"step": 2, "forget": 0.5, **other}])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Total loss", "Forgetting  ×3", "Retention", "Weight anchor", "Learning rate"]


def test_losses_with_missing_values_are_drawn():
    steps = [line for line in sample_run().metrics if "total" in line]
    assert "Validation score" not in texts(drawn("losses", metrics=steps))
    holes = [{**line, "forget": None, "total": float("nan")} for line in steps]
    assert texts(drawn("losses", metrics=holes)).count("not recorded") == 2
    short = drawn("losses", metrics=steps[:1])  # the chosen step lies outside
    assert drawing.png(short).startswith(b"\x89PNG")
    assert "chosen" not in texts(short)
    evaluation = {"step": 1, "validation": {"forget": None, "retain": None}}
    assert drawn("losses", metrics=[*steps, evaluation]) is not None


def test_axis_labels_write_small_and_large_values_in_full():
    values = (0.0, 3e-17, 1e-6, -2.5e-4, 0.02, -0.5, 12.0, 3e7)
    assert [drawing.short_number(value) for value in values] == [
        "0", "0", "1e−6", "−2.5e−4", "0.02", "−0.5", "12", "3e7"]  # fmt: skip


def test_loss_curves_are_the_logged_values():
    axes = drawn("losses").axes[0]
    x, y = axes.lines[0].get_data()
    np.testing.assert_array_equal(x, np.arange(1, 9))
    np.testing.assert_allclose(y, 2.0 / np.arange(1, 9))


def test_a_long_run_gets_a_running_mean():
    steps = [
        {
            "step": i + 1,
            "total": float(i % 2),
            "retain": 1.0,
            "forget": 0.0,
            "consistency": 0.0,
            "learning_rate": 1e-6,
        }
        for i in range(500)
    ]
    raw, mean = drawn("losses", metrics=steps).axes[0].lines[:2]
    assert np.ptp(raw.get_ydata()) == 1
    assert np.ptp(mean.get_ydata()[20:-20]) < 0.1
    assert len(mean.get_ydata()) == 500


def many_classes(count, forget):
    per_class = {
        f"class {i:03}": {
            "set": "forget" if i < forget else "retain",
            "pairs": 5,
            "before": 0.9,
            "after": 0.9 - i / 1000,
        }
        for i in range(count)
    }
    return {**sample_result(), "per_class": per_class}


def test_forget_classes_come_first_then_the_largest_losses():
    result = sample_result()
    result["per_class"]["seven"]["after"] = 0.9
    result["per_class"]["two"]["after"] = 0.5
    rows, total = plots.changed_classes(result)
    assert total == 4
    assert [name for name, _ in rows] == ["seven", "two", "one", "three"]
    assert [row["after"] for _, row in rows] == [0.9, 0.5, 0.96, 0.96]


@pytest.mark.parametrize(("forget", "forget_shown"), [(3, 3), (90, 30), (150, 40)])
def test_of_many_classes_the_most_changed_are_shown(forget, forget_shown):
    count = 100 if forget < 100 else 150
    rows, total = plots.changed_classes(many_classes(count, forget), 40)
    assert total == count
    assert len(rows) == 40
    assert sum(row["set"] == "forget" for _, row in rows) == forget_shown
    shown = [name for name, row in rows if row["set"] == "retain"]
    assert shown == [f"class {i:03}" for i in range(count - 1, count - 1 - len(shown), -1)]
    assert f"the 40 most changed of {count} classes" in texts(drawn("per_class", result=many_classes(count, forget)))


def test_classes_without_both_accuracies_are_left_out():
    result = sample_result()
    result["per_class"]["one"]["after"] = None
    assert plots.changed_classes(result)[1] == 3


def test_a_partly_forgotten_class_is_marked():
    result = sample_result()
    result["per_class"]["one"]["set"] = "mixed"
    assert "one (partly)" in texts(drawn("per_class", result=result))


def test_names_are_not_parsed_as_formulas_and_long_names_are_cut():
    result = sample_result()
    row = {"set": "retain", "pairs": 1, "before": 0.5, "after": 0.5}
    result["per_class"] |= {
        r"$\frac{1$": row,
        "a $5 bill$": row,
        "x" * 80: row,
        "two\nlines": row,
        "": row,
        "猫": row,
    }
    figure = drawn("per_class", result=result)
    assert drawing.png(figure).startswith(b"\x89PNG")  # a formula would fail here
    written = texts(figure)
    assert "x" * 25 + "…" in written
    assert "two lines" in written
    assert "(no name)" in written


def test_similarity_means_are_written_and_all_pairs_are_in_the_histograms():
    run = sample_run()
    figure = plots.draw_similarities(run, drawing.LIGHT)
    for which in ("forget", "retain"):
        for when in ("before", "after"):
            mean = run.similarities[when][which].mean()
            assert f"{when}: mean {mean:.2f}".replace("-", "−") in texts(figure)
    shares = [patch.get_data().values for axes in figure.axes for patch in axes.patches if patch.get_fill()]
    assert [share.sum() for share in shares] == pytest.approx([1.0] * 4)


def test_similarities_with_missing_values_are_drawn():
    before = {"forget": np.array([0.5]), "retain": np.array([])}
    after = {"forget": np.array([np.nan, 0.5])}
    figure = drawn("similarities", similarities={"before": before, "after": after})
    assert "Retain pairs" not in texts(figure)
    assert drawn("similarities", similarities={"before": {"forget": np.array([np.nan])}}) is None


def test_the_map_is_the_principal_components_of_before_for_both():
    run = sample_run()
    maps = plots.project(run)
    before, after = (run.embeddings[when].astype(np.float64) for when in ("before", "after"))
    vectors = np.linalg.eigh(np.cov(before.T))[1]
    for component in (0, 1):
        axis = vectors[:, -1 - component]
        expected = (before - before.mean(0)) @ axis
        sign = np.sign(expected @ maps["before"][:, component])
        np.testing.assert_allclose(maps["before"][:, component], sign * expected, atol=1e-8)
        np.testing.assert_allclose(maps["after"][:, component], sign * ((after - before.mean(0)) @ axis), atol=1e-8)


def test_the_order_of_the_images_does_not_flip_the_map():
    features = sample_run().embeddings["before"]
    expected = plots.project(sample_run())["before"]
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(len(features))
        shuffled = plots.project(sample_run(embeddings={"before": features[order]}))["before"]
        np.testing.assert_allclose(shuffled, expected[order], atol=1e-8)


@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (5, 1), (3, 2)])
def test_few_images_or_dimensions_can_still_be_mapped(shape):
    points = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    changes = {
        "embeddings": {"before": points, "after": points * np.nan},
        "embedding_sets": ["retain"] * shape[0],
        "embedding_labels": ["a"] * shape[0],
    }
    assert plots.project(sample_run(**changes))["before"].shape == (shape[0], 2)
    assert drawing.png(drawn("embeddings", **changes)).startswith(b"\x89PNG")


def test_before_and_after_share_their_axes_and_name_their_classes():
    figure = drawn("embeddings")
    before, after = figure.axes
    assert before.get_xlim() == after.get_xlim()
    assert before.get_ylim() == after.get_ylim()
    assert texts(figure).count("seven") == 2
    many = drawn("embeddings", embedding_labels=[f"image {i}" for i in range(40)])
    assert not any(text.startswith("image ") for text in texts(many))


def test_without_after_only_before_is_mapped():
    figure = drawn("embeddings", embeddings={"before": sample_run().embeddings["before"]})
    assert len(figure.axes) == 1


def test_class_names_on_the_map_do_not_overlap():
    names = [["zero", "one", "two", "seven"][i % 4] for i in range(40)]
    figure = drawn("embeddings", embedding_labels=names)
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text() in names]
        assert len(boxes) == 4
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_names_on_the_map_leave_single_points_visible():
    points = np.array([[0.0, 0.0], [1.0, 0.2], [0.4, 1.0]])
    changes = {"embedding_sets": ["forget", "retain", "retain"], "embedding_labels": ["cat", "dog", "tall tree"]}
    (axes,) = drawn("embeddings", embeddings={"before": points}, **changes).axes
    axes.figure.draw_without_rendering()
    centres = [axes.transData.transform(at) for dots in axes.collections for at in dots.get_offsets()]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(centres) == len(boxes) == 3
    assert not [at for at in centres for box in boxes if box.contains(*at)]


def test_weights_are_written_for_cliperase_alone():
    config = {**sample_result()["config"], "method": "gradient_ascent"}
    assert "Forgetting" in texts(drawn("losses", result={**sample_result(), "config": config}))


def boxes_of(axes, written):
    axes.figure.draw_without_rendering()
    return [text.get_window_extent() for text in axes.texts if written in text.get_text()]


@pytest.mark.parametrize("score", [0.0, 0.1, 0.9, 1.0])
def test_names_of_validation_curves_that_end_side_by_side_do_not_overlap(score):
    steps = [line for line in sample_run().metrics if "total" in line]
    line = {"step": 8, "validation": {"forget": score, "retain": abs(score - 0.05)}}
    axes = drawn("losses", metrics=[*steps, line]).axes[-1]
    retain, forget = boxes_of(axes, "retain") + boxes_of(axes, "forget")
    assert not retain.overlaps(forget)


@pytest.mark.parametrize(("before", "after"), [(0.1, 0.2), (0.2, 0.1), (-0.1, 0.1)])
def test_the_name_of_the_mean_after_does_not_cross_the_line_of_the_mean_before(before, after):
    wide = np.array([-0.5, 0.5])
    values = {"before": {"forget": wide, "retain": wide + before}, "after": {"forget": wide, "retain": wide + after}}
    axes = drawn("similarities", similarities=values).axes[1]
    (box,) = boxes_of(axes, "after")
    line = axes.transData.transform((before, 0))[0]
    assert not box.x0 < line < box.x1


@pytest.mark.parametrize("name", ["n02099601_golden_retriever_puppy", "とても長いクラス名" * 4], ids=["long", "wide"])
def test_long_names_of_partly_forgotten_classes_leave_room_for_the_title_and_the_legend(name):
    result = sample_result()
    result["per_class"][name] = {**result["per_class"]["one"], "set": "mixed"}
    figure = drawn("per_class", result=result)
    drawing.png(figure)  # lays it out
    (axes,) = figure.axes
    assert not axes._left_title.get_window_extent().overlaps(axes.get_legend().get_window_extent())


def test_the_levels_of_an_audit_stand_in_the_panel_of_the_forget_pairs():
    audit = {"background": -0.9, "scores": {"oracle": {"forgetting": {"association": {"value": 0.25}}}}}
    figure = drawn("similarities", audit=audit)
    forget, retain = figure.axes
    assert [text.get_text() for text in forget.get_legend().get_texts()] == ["background", "oracles"]
    lines = [line.get_xdata()[0] for line in forget.lines if line.get_linestyle() == "--"]
    assert lines == [-0.9, 0.25]
    assert forget.get_xlim()[0] < -0.9
    assert retain.get_legend() is None
    assert drawn("similarities").axes[0].get_legend() is None
    without = drawn("similarities", audit={**audit, "scores": {}})
    assert [text.get_text() for text in without.axes[0].get_legend().get_texts()] == ["background"]
