"""Tests of `cliperase-fast bench loss`: right providers get a time, wrong or missing ones a reason."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from cliperase_fast.benchmarks import loss, loss_report, options, plots, points_report, providers
from cliperase_fast.benchmarks.batches import Case, errors, functional_loss, make_batch, truth
from cliperase_fast.benchmarks.compare import comparison

CASE = Case("cliperase", "peaked", "float32", 48, 24)


@pytest.mark.parametrize("kind", ["cliperase", "clip", "siglip"])
@pytest.mark.parametrize("data", ["peaked", "random"])
def test_the_copies_of_open_clips_formulas_equal_open_clips_losses(kind, data):
    batch = make_batch(replace(CASE, loss=kind, data=data, dtype="float64"), "cpu")
    known = providers.every_provider()
    values = [known[name].make(CASE)(*batch) for name in ("open_clip", "open_clip-style")]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["open_clip", "open_clip-style", "ours-torch", "ours-eager"])
def test_every_provider_has_the_true_loss_and_gradients(name):
    provider = providers.every_provider()[name]
    batch = make_batch(CASE, "cpu")
    found = errors(provider.make(CASE), batch, truth(batch), provider.adds_entropy, provider.scale_gradient)
    assert set(found) == {"loss", "image", "text", "scale", "forget_image", "forget_text"}
    assert max(found.values()) < 1e-4


@pytest.mark.parametrize("name", ["open_clip", "open_clip-style", "ours-auto", "ours-native"])
def test_the_sigmoid_loss_of_every_provider_is_the_true_one(name):
    case = replace(CASE, loss="siglip")
    assert providers.check(providers.every_provider()[name], case, "cpu")[1] is None
    batch = make_batch(case, "cpu")
    found = errors(providers.every_provider()[name].make(case), batch, truth(batch), False, True)
    assert set(found) == {"loss", "image", "text", "scale", "bias"} and max(found.values()) < 1e-4


def test_a_wrong_bias_is_noticed():
    case = replace(CASE, loss="siglip")

    def off(*fields):
        return functional_loss("auto")(*fields[:-1], 1.1 * fields[-1])

    wrong = providers.check(providers.Provider("off", lambda case: off), case, "cpu")[1]
    assert wrong is not None and "off by" in wrong


def test_every_provider_has_a_note_and_gpu_providers_say_so():
    for provider in providers.every_provider().values():
        assert provider.note, provider.name
    missing = providers.every_provider()["siglip-kernel"]
    assert missing.why_not(replace(CASE, loss="siglip"), "cpu") == "needs a GPU"
    assert missing.why_not(CASE, "cuda") == "does not compute cliperase, only siglip"


def test_a_wrong_gradient_and_a_missing_one_are_noticed():
    batch = make_batch(CASE, "cpu")
    right = functional_loss("eager")

    def off(*fields):
        return right(*fields) + 0.1 * fields[1].square().sum() - 0.1 * fields[1].square().sum().detach()

    found = errors(off, batch, truth(batch), False, True)
    assert found["loss"] < 1e-4 and found["text"] > 0.01
    constant = errors(lambda *fields: right(fields[0].detach(), *fields[1:]), batch, truth(batch), False, True)
    assert constant["image"] == float("inf")


def run(monkeypatch, tmp_path, *words: str, **extra: providers.Provider) -> dict:
    known = {**providers.every_provider(), **extra}
    for module in (loss, options):
        monkeypatch.setattr(module, "every_provider", lambda: known)
    arguments = loss.parser().parse_args(
        ["--sizes", "48", "--widths", "24", "--rounds", "1", "--device", "cpu", *words]
    )
    record, status = loss.measure(arguments, words, tmp_path / "record.json")
    return {**record, "status": status}


def failing(*fields):
    raise RuntimeError("a kernel fell over")


def test_a_wrong_missing_or_broken_provider_gets_a_reason_and_no_time(monkeypatch, tmp_path, capsys):
    wrong = providers.Provider("wrong", lambda case: lambda *fields: 2 * functional_loss("eager")(*fields))
    broken = providers.Provider("broken", lambda case: failing)
    absent = providers.Provider("absent", lambda case: failing, package="no-such-package")
    words = ("--dtypes", "float32", "--providers", "ours-eager,wrong,broken,absent")
    record = run(monkeypatch, tmp_path, *words, wrong=wrong, broken=broken, absent=absent)
    rows = {row["provider"]: row for row in record["runs"]}
    assert rows["ours-eager"]["status"] == rows["floor"]["status"] == "ok"
    assert rows["ours-eager"]["both_ms"]["median"] > 0
    assert rows["wrong"]["status"] == "failed" and "off by" in rows["wrong"]["reason"]
    assert rows["broken"]["reason"] == "RuntimeError: a kernel fell over"
    assert rows["absent"]["status"] == "n/a" and rows["absent"]["reason"] == "no-such-package is not installed"
    for name in ("wrong", "broken", "absent"):
        assert "both_ms" not in rows[name]
    table = loss_report.full_text(record)
    assert "failed: RuntimeError: a kernel fell over" in table and "n/a: no-such-package" in table
    assert "a kernel fell over" in capsys.readouterr().err  # with its traceback


def test_a_failure_of_our_own_is_the_exit_status(monkeypatch, tmp_path):
    broken = {"ours-broken": providers.Provider("ours-broken", lambda case: failing)}
    words = ("--dtypes", "float32", "--providers", "ours-broken")
    assert run(monkeypatch, tmp_path, *words, **broken)["status"] == 1


def test_a_run_from_the_command_line_to_file_tables_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    path = tmp_path / "mine.json"
    words = ["--sizes", "32,48", "--widths", "24", "--rounds", "1", "--dtypes", "float32", "--device", "cpu"]
    words += ["--providers", "ours-torch,open_clip", "--json", str(path), "--plots", str(tmp_path / "plots")]
    assert loss.main(words) == 0
    record = json.loads(path.read_text())
    assert [row["provider"] for row in record["runs"]] == ["floor", "ours-torch", "open_clip"] * 2
    assert record["machine"]["cores"] and record["versions"]["torch"] and record["date"]
    assert (tmp_path / "out" / "mine.json").read_text() == path.read_text()
    for kind in ("time", "roofline"):
        assert (tmp_path / "plots" / f"{kind}-cliperase-peaked-float32-24.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "cliperase, peaked data, float32, D = 24, N = 48" in shown and "open_clip" in shown
    assert loss.main(["--from", str(path)]) == 0
    assert capsys.readouterr().out == shown


def times(median: float, spread: float = 0.0) -> dict:
    return {"median": median, "q1": median - spread, "q3": median + spread, "samples": 9}


def record_of(**medians: tuple[float, float] | None) -> dict:
    rows = []
    for name, found in medians.items():
        row = {"loss": "cliperase", "data": "peaked", "dtype": "bfloat16", "n": 32768, "width": 768, "provider": name}
        row |= {"status": "n/a", "reason": "out of memory"}
        if found is not None:
            row |= {"status": "ok", "reason": "", "error": 1e-3, "extra_bytes": 300 << 20}
            row |= {f"{part}_ms": times(*found) for part in ("forward", "backward", "both")}
        rows.append(row)
    return {"runs": rows, "device": "h200"}


def test_a_change_within_the_noise_is_called_the_same():
    before = record_of(floor=(10, 0), steady=(20, 1), noisy=(20, 6), better=(20, 0.1), gone=(20, 0.1))
    after = record_of(floor=(20, 0), steady=(21, 1), noisy=(25, 6), better=(15, 0.1), gone=None)
    lines = {line[1]: line for line in comparison(before, after)[1] if line[2] != "extra_bytes"}
    assert [lines[name][-1] for name in ("steady", "noisy", "better", "gone", "floor")] == [
        "same", "same", "faster", "changed", "slower",
    ]  # fmt: skip
    assert lines["better"][5:7] == ("0.750", "0.375")  # twice as fast against its own run's floor again
    assert lines["gone"][4] == "n/a"


def test_memory_is_compared_too_and_records_of_two_kinds_are_not():
    before, after = record_of(ours=(20, 0)), record_of(ours=(20, 0))
    after["runs"][0]["extra_bytes"] = 400 << 20
    weighed = [line for line in comparison(before, after)[1] if line[2] == "extra_bytes"]
    assert [line[3:6] + line[-1:] for line in weighed] == [("300.0 MiB", "400.0 MiB", "1.333", "more")]
    with pytest.raises(SystemExit, match="the one is a record of bench loss, the other of bench scaling"):
        comparison(before, {**after, "benchmark": "scaling"})


def test_the_runs_of_a_training_loop_are_compared_as_one():
    def trained(*step_seconds):
        runs = [{"who": "unlearn", "setting": "demo", "step_seconds": s, "peak_bytes": 500 << 20} for s in step_seconds]
        return {"runs": runs}

    changes = comparison(trained([0.1, 0.1], [0.1, 0.1]), trained([0.05, 0.05], [0.05, 0.06]))[1]
    assert [line[1:6] + line[-1:] for line in changes] == [
        ("unlearn", "step_ms", "100", "50", "0.500", "faster"),
        ("unlearn", "peak_bytes", "500.0 MiB", "500.0 MiB", "1.000", "same"),
    ]


def test_the_targets_say_what_is_met_and_what_is_not():
    slow = {"open_clip-style-compiled": (30, 0), "open_clip-style": None}
    head, lines = loss_report.targets_table(record_of(floor=(10, 0), **{"ours-triton": (18, 0)}, **slow))
    assert head[:2] == ("N", "provider")
    found = next(line for line in lines if line[1] == "ours-triton")
    assert found[2] == "18.0 ms (at most 20: met)"
    assert found[3] == "1.80x (at most 1.5: NOT MET)"
    assert found[4].startswith("300 MiB (at most ") and found[4].endswith("met)")
    assert found[5] == "1.67x (at least 2: NOT MET)"
    assert found[6] == "nothing to compare with"
    assert ("65,536", "not run", "", "", "", "", "") in lines


def test_the_gpu_set_can_be_rehearsed_on_the_cpu():
    plan = loss.gpu_plan("cpu")
    assert len(plan) == len(loss.gpu_plan("cuda")) and max(case.n for case, _ in plan) <= 1024
    assert all(set(who) <= set(providers.default_names(case.loss)) for case, who in plan)
    assert all(set(who) == {"ours-torch"} for _, who in loss.gpu_plan("cpu", ["ours-torch"]))
    (first, own), (again, others) = loss.gpu_plan("cuda")[:2]
    assert first == again and "ours-triton-keep-nothing" in own and "open_clip-compiled" in others


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sizes", "big"], "'big' is not a list of whole numbers"),
        (["--sizes", "0"], "numbers from 1 on"),
        (["--providers", "ours-eager,nobody"], "'nobody' is not known; use"),
        (["--dtypes", "int8"], "'int8' is not known; use float32"),
    ],
)
def test_wrong_options_are_named(words, says, capsys):
    with pytest.raises(SystemExit):
        loss.main(words)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [[1024], [1024, 2048]])
def test_one_size_is_drawn_as_bars_and_several_as_lines(sizes):
    rows = []
    for n in sizes:
        for row in record_of(floor=(5, 0), ours=(10, 0), other=(20, 0))["runs"]:
            rows.append({**row, "n": n})
    for kind, measure in (("time", "both_ms"), ("memory", "extra_bytes")):
        found = points_report.groups({"runs": rows}).popitem()[1]
        figure = plots._against_n(plots._series(found, measure), kind, None)
        (axes,) = figure.axes
        assert [len(line.get_xdata()) for line in axes.lines] == ([] if len(sizes) == 1 else [len(sizes)] * 3)
        assert len(axes.patches) == (3 if len(sizes) == 1 else 0)
        plots.plt.close(figure)


def test_a_provider_says_whether_auto_would_keep_as_much():
    known, batch = providers.every_provider(), make_batch(replace(CASE, n=64, width=64), "cpu")
    kept = {keep: known[f"ours-native-keep-{keep}"].does_as_auto(batch) for keep in ("similarities", "nothing")}
    assert kept == {"similarities": True, "nothing": False}
    assert known["ours-torch"].does_as_auto(batch)


def test_bfloat16_stands_beside_float32_by_size_and_width():
    def row(dtype: str, n: int, ms: float, provider: str = "ours-auto") -> dict:
        case = {"loss": "clip", "data": "peaked", "dtype": dtype, "n": n, "width": 64}
        return {**case, "provider": provider, "status": "ok", "both_ms": {"median": ms}}

    runs = [row("float32", 512, 3.0), row("float32", 512, 9.0, "open_clip"), row("bfloat16", 512, 2.0)]
    tables = loss_report.own_dtype_tables({"runs": [*runs, row("bfloat16", 2048, 9.0)]})
    title = "clip, peaked data, our bfloat16 against our float32"
    assert tables == {title: (("N", "D = 64"), [("512", "1.50x")])}


def test_the_calibrated_loss_stands_beside_cliperase_loss_by_size_and_width():
    def row(n: int, width: int, provider: str, ms: float) -> dict:
        case = {"loss": "calibrated", "data": "peaked", "dtype": "float32", "n": n, "width": width}
        return {**case, "provider": provider, "status": "ok", "both_ms": {"median": ms}}

    runs = [
        row(2048, 128, "ours-auto", 11.0), row(2048, 128, "ours-cliperase", 10.0),
        row(512, 64, "ours-auto", 3.0), row(512, 64, "ours-cliperase", 2.0),
        row(512, 128, "ours-auto", 3.0),
    ]  # fmt: skip
    tables = loss_report.beside_cliperase_tables({"runs": runs})
    lines = [("512", "1.50x", ""), ("2,048", "", "1.10x")]
    assert tables == {"peaked data, float32": (("N", "D = 64", "D = 128"), lines)}
    assert loss_report.speedup_tables({"runs": runs}) == {}
