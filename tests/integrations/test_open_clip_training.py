"""`open_clip_train.main` end to end: the stock losses and the fused ones give the same run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import open_clip
import open_clip.factory
import open_clip.loss
import open_clip_runs as runs
import pytest
import torch

import cliperase_fast as cf
from cliperase_fast import cli
from cliperase_fast.integrations import open_clip as integration
from cliperase_fast.integrations import open_clip_losses

NAMES = ("ClipLoss", "DistillClipLoss", "SigLipLoss")
STOCK = {name: getattr(open_clip.loss, name) for name in NAMES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    runs.write_data(folder)
    return folder


def distilling(folder):
    return ["--distill-model", "tiny-clip", "--distill-pretrained", folder / "teacher.pt"]


CASES = {
    "shards": ("webdataset", [], 1e-5),
    "csv": ("csv", [], 1e-5),
    "accumulation": ("csv", ["--accum-freq", 2], 1e-5),
    "siglip": ("csv", ["--siglip"], 1e-5),
    "distillation": ("csv", distilling, 1e-5),
    "checkpointing": ("csv", ["--grad-checkpointing", "--grad-clip-norm", 1.0], 1e-5),
    # open_clip rounds its similarities to bfloat16, 8 bits of mantissa, and the fused losses do not
    "bfloat16": ("csv", ["--precision", "amp_bf16"], 2e-2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_open_clips_trainer_has_the_same_losses_with_the_patch(name, folder):
    kind, extra, tolerance = CASES[name]
    words = runs.arguments(folder, kind, *(extra(folder) if callable(extra) else extra))
    *stock, stock_package = runs.run(folder, f"{name}-stock", False, words)
    *fused, fused_package = runs.run(folder, f"{name}-fused", True, words)
    assert (stock_package["package"], fused_package["package"]) == ("open_clip", "cliperase_fast")
    assert len(fused) == len(stock) == 12
    for ours, theirs in zip(fused, stock, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    assert fused[0] != fused[-1]  # it trained


@pytest.mark.parametrize(
    "extra",
    [[], ["--local-loss"], ["--local-loss", "--gather-with-grad"], ["--siglip"], "distillation"],
    ids=lambda extra: "-".join(extra) if isinstance(extra, list) else extra,
)
def test_two_ranks_train_alike_with_and_without_the_patch(extra, folder):
    name = "".join(extra)
    words = runs.arguments(folder, "csv", *(distilling(folder) if extra == "distillation" else extra))
    for label in ("stock", "patched"):
        launch(folder, f"two{name}-{label}", label, words)
    for rank in (0, 1):
        stock, ours = (runs.read(folder, f"two{name}-{label}", rank) for label in ("stock", "patched"))
        assert (stock.pop()["package"], ours.pop()["package"]) == ("open_clip", "cliperase_fast")
        assert len(ours) == len(stock) == 6
        for one, other in zip(ours, stock, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


def launch(folder, name, label, words):
    """Two processes with gloo, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, runs.__file__, str(folder), name, label, *words]
    with ExitStack() as stack:
        ranks = []
        for rank in ("0", "1"):
            environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            stack.callback(process.kill)
            ranks.append(process)
        for process in ranks:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said


def found(module):
    return {name: getattr(module, name) for name in NAMES if hasattr(module, name)}


def test_the_patch_covers_every_place_and_is_undone():
    before = [found(module) for module in (open_clip.loss, open_clip.factory, open_clip)]
    with cf.patch_open_clip() as patch:
        for module in (open_clip.loss, open_clip.factory, open_clip):
            assert found(module) == {name: getattr(cf, name) for name in found(module)}
        assert {"open_clip.loss.ClipLoss", "open_clip.factory.SigLipLoss"} <= set(patch.replaced)
    assert [found(module) for module in (open_clip.loss, open_clip.factory, open_clip)] == before


def test_patching_twice_is_harmless_and_an_inner_block_undoes_nothing():
    with cf.patch_open_clip():
        with cf.patch_open_clip() as inner:
            assert inner.replaced == []
        assert open_clip.loss.ClipLoss is cf.ClipLoss
    assert found(open_clip.loss) == STOCK
    patch = cf.patch_open_clip()
    cf.patch_open_clip()
    cf.unpatch_open_clip()
    cf.unpatch_open_clip()
    patch.unpatch()
    assert found(open_clip.loss) == found(open_clip.factory) == STOCK


def test_a_users_own_subclass_is_never_replaced(monkeypatch):
    class Mine(open_clip.loss.ClipLoss):
        pass

    monkeypatch.setattr(open_clip.factory, "ClipLoss", Mine)
    with cf.patch_open_clip():
        assert open_clip.factory.ClipLoss is Mine
        assert open_clip.loss.ClipLoss is cf.ClipLoss
    assert open_clip.factory.ClipLoss is Mine


def test_modules_loaded_while_patched_are_cleaned_too(monkeypatch):
    late = type(sys)("open_clip.late")
    with cf.patch_open_clip():
        late.ClipLoss = open_clip.loss.ClipLoss
        monkeypatch.setitem(sys.modules, "open_clip.late", late)
    assert late.ClipLoss is STOCK["ClipLoss"]


def test_other_signatures_are_refused_with_nothing_patched(monkeypatch):
    def forward(self, image_features, text_features, logit_scale, temperature):
        raise AssertionError

    monkeypatch.setattr(STOCK["SigLipLoss"], "forward", forward)
    monkeypatch.setattr(cf.SigLipLoss, "forward", lambda self, image_features, text_features: None)
    with pytest.raises(cf.InputError, match=r"SigLipLoss.*>=3\.0"):
        cf.patch_open_clip()
    assert found(open_clip.loss) == found(open_clip.factory) == STOCK


@pytest.mark.parametrize("version", ["2.32.0", "4.0.0"])
def test_an_unsupported_version_is_refused_by_the_range(version, monkeypatch):
    from cliperase_fast.integrations import versions

    monkeypatch.setattr(versions.importlib.metadata, "version", lambda package: version)
    with pytest.raises(cf.InputError, match=rf"{version} is installed; this works with open_clip_torch >=3\.0,<4\.0"):
        open_clip_losses.check_version()


def test_the_command_line_runs_the_trainer_patched(folder, monkeypatch, capfd):
    import open_clip_train.main as trainer

    words = runs.arguments(folder, "csv", "--name", "command-line", "--epochs", 1)
    with runs.recording() as losses:
        assert cli.main(["train-open-clip", "--", *words]) == 0
    assert losses[-1] == {"package": "cliperase_fast"}
    assert trainer.create_loss.__globals__["ClipLoss"] is STOCK["ClipLoss"]  # and it cleaned up
    assert (folder / "logs" / "command-line" / "checkpoints" / "epoch_1.pt").is_file()


def test_shards_with_a_reader_that_open_clip_does_not_take_are_refused(monkeypatch):
    monkeypatch.setattr(integration, "_reader_marks_shard_ends", lambda: True)
    with pytest.raises(cf.InputError, match="webdataset<=0.2.86"):
        integration.train_open_clip(["--train-data", "/data/{0..9}.tar"])
