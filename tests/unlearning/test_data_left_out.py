"""What of the data is left out is counted in the result, and names or reports that fail cost nothing."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUICK, TwoTowers, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast import InputError
from cliperase_fast.unlearning import result as result_module

SHORT = {**QUICK, "epochs": 1}
FORGET, RETAIN = split_pairs(make_pairs(per_colour=8), "red")


def counts(result):
    return {reason: row["count"] for reason, row in result.record["data"]["skipped"].items()}


def colour_folders(root):
    for colour in ("red", "blue"):
        (root / colour).mkdir(parents=True)
        for n in range(8):
            Image.new("RGB", (8, 8), colour).save(root / colour / f"{n}.png")
    return root


def test_unusable_items_of_a_dataset_are_skipped_and_counted(tmp_path):
    broken = FORGET[0][0].clone()
    broken[0, 0, 0] = float("nan")
    forget = [*FORGET, (broken, "a red square"), (FORGET[0][0], " ")]
    retain = [*RETAIN, (RETAIN[0][0], None)]
    with pytest.raises(InputError, match=r"item 9 of forget is empty.*on_error='skip'"):
        cf.unlearn(make_tiny_clip(), forget, retain, **SHORT)
    result = cf.unlearn(make_tiny_clip(), forget, retain, on_error="skip", output_dir=tmp_path / "run", **SHORT)
    expected = {"empty caption": 1, "caption is not text": 1, "pixels are not finite": 1}
    assert counts(result) == expected
    saved = json.loads((tmp_path / "run" / "result.json").read_text())["data"]["skipped"]
    assert saved == result.record["data"]["skipped"]
    assert "item 9 of forget" in saved["empty caption"]["example"]
    for reason in expected:
        assert f"1 x {reason}" in result.summary()


def test_unusable_rows_of_a_table_are_skipped_and_counted(tmp_path):
    colour_folders(tmp_path)
    rows = [f"{colour}/{n}.png\ta {colour} square" for colour in ("red", "blue") for n in range(8)]
    bad = ["red/0.png\ta red\tsquare", "blue/gone.png\ta blue square", "\ta blue square"]
    (tmp_path / "t.tsv").write_text("\n".join(["filepath\ttitle", *rows, *bad]) + "\n")
    result = cf.unlearn(make_tiny_clip(), f"csv:{tmp_path}/t.tsv#caption:red", "rest", on_error="skip", **SHORT)
    assert counts(result) == {"row with too many cells": 1, "row without an image": 1, "image does not exist": 1}


def test_retain_pairs_dropped_for_overlap_and_captions_that_are_cut_are_counted():
    long = " ".join(["square"] * 20)
    retain = [*RETAIN, *FORGET[:2], *((image, f"{caption} {long}") for image, caption in RETAIN[:2])]
    result = cf.unlearn(make_tiny_clip(), FORGET, retain, overlap="drop", long_captions="truncate", **SHORT)
    assert counts(result) == {"retain pair that is also a forget pair": 2}
    assert result.record["data"]["cut_captions"] == 1
    assert "1 different caption was cut to the 8 tokens of the model's context" in result.summary()


def test_evaluation_counts_what_it_skips(tmp_path):
    colour_folders(tmp_path)
    (tmp_path / "blue" / "bad.png").write_bytes(b"?")
    arguments = (make_tiny_clip(), f"folder:{tmp_path}")
    with pytest.raises(InputError, match=r"bad\.png"):
        cf.evaluate(*arguments, forget="class:red", progress=False)
    scores = cf.evaluate(*arguments, forget="class:red", on_error="skip", progress=False)
    assert scores["retain"]["pairs"] == 8
    assert scores["skipped"]["image cannot be decoded"]["count"] == 1
    for n in range(8):
        (tmp_path / "red" / f"{n}.png").write_bytes(b"?")
    with pytest.raises(InputError, match=r"to score each set \(first unreadable: "):
        cf.evaluate(*arguments, forget="class:red", on_error="skip", progress=False)


def test_a_failing_report_is_only_a_warning(tmp_path, monkeypatch):
    def fail(*arguments):
        raise UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates not allowed")

    monkeypatch.setattr(result_module, "write_plots", fail)
    with pytest.warns(UserWarning, match=r"plots and report\.html are incomplete: UnicodeEncodeError"):
        result = cf.unlearn(make_tiny_clip(), FORGET, RETAIN, output_dir=tmp_path / "run", **{**SHORT, "report": True})
    assert "the report is missing: UnicodeEncodeError" in result.summary()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["after"] == result.after
    assert (tmp_path / "run" / "model").is_dir()


def test_paths_that_are_not_utf_8_run_to_the_report(tmp_path):
    root = colour_folders(tmp_path / os.fsdecode(b"caf\xe9"))
    os.rename(root / "red" / "0.png", root / "red" / os.fsdecode(b"caf\xe9.png"))
    (root / "blue" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"?")
    rows = [path.relative_to(root) for colour in ("red", "blue") for path in sorted((root / colour).iterdir())]
    lines = "".join(f"{row}\n" for row in rows if row.parent.name == "red")
    (root / "ids.txt").write_text(lines, errors="backslashreplace")
    result = cf.unlearn(
        make_tiny_clip(),
        f"folder:{root}#ids:{root / 'ids.txt'}",
        "rest",
        output_dir=tmp_path / "run",
        on_error="skip",
        **{**SHORT, "report": True},
    )
    assert result.report_failure is None and (tmp_path / "run" / "report.html").is_file()
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "caf\\udce9#ids:" in record["data"]["forget"]
    assert "caf\\udce9.png" in record["data"]["skipped"]["image cannot be decoded"]["example"]
    json.dumps(record, ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("bad", [49408, 10**6])
def test_token_ids_beyond_the_vocabulary_are_refused_before_training(tmp_path, bad):
    def with_tokens(pairs, spoilt=None):
        return [
            (image, torch.tensor([1, 2 + n % 3, spoilt if n == 0 and spoilt else 3, 4, 5, 6, 7, 8]))
            for n, (image, _) in enumerate(pairs)
        ]

    test = (with_tokens(FORGET[:4]), with_tokens(RETAIN[:4]))
    with pytest.raises(
        InputError,
        match=rf"token captions do not fit .*: there are ids from 1 to {bad} .* vocabulary has 49408 entries",
    ):
        cf.unlearn(make_tiny_clip(), with_tokens(FORGET), with_tokens(RETAIN, bad), test=test, **SHORT)
    with pytest.raises(
        InputError, match=r"token captions do not fit .* there are 9 tokens per caption .* context holds 8"
    ):
        long = [[(image, torch.full((9,), n)) for image, _ in pairs] for n, pairs in enumerate((FORGET, RETAIN))]
        cf.unlearn(make_tiny_clip(), *long, **SHORT)


def test_token_ids_that_a_custom_module_cannot_encode_are_refused_before_writing(tmp_path):
    def with_tokens(pairs, spoilt=0):
        return [(image, torch.tensor([1, 2 + n % 3, spoilt * (n == 0)])) for n, (image, _) in enumerate(pairs)]

    model, test = TwoTowers(vocabulary=16), (with_tokens(FORGET[:4]), with_tokens(RETAIN[:4]))
    with pytest.raises(InputError, match=r"cannot encode a caption of 3 tokens with ids up to 99 \(index out of range"):
        cf.unlearn(model, with_tokens(FORGET), with_tokens(RETAIN, 99), test=test, output_dir=tmp_path / "run", **SHORT)
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        InputError, match=r"cannot encode captions of 3 tokens with ids from 0 to 99 \(index out of range"
    ):
        cf.evaluate(model, with_tokens(RETAIN, 99), progress=False)


def test_images_of_every_mode_give_the_same_pixels_from_every_source(tmp_path):
    gray = Image.fromarray(np.full((8, 8), 257 * 90, dtype=np.uint16))
    (tmp_path / "c").mkdir()
    gray.save(tmp_path / "c" / "x.png")
    model = make_tiny_clip()
    from_file = cf.evaluate(model, f"folder:{tmp_path}", progress=False)
    in_memory = cf.evaluate(model, [(gray, "a photo of a c")], progress=False)
    array = cf.evaluate(model, [(np.full((8, 8, 3), 90, dtype=np.uint8), "a photo of a c")], progress=False)
    assert from_file["all"]["association"] == in_memory["all"]["association"] == array["all"]["association"]
