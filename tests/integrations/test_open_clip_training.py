"""`open_clip_train.main` end to end: the stock losses and the fused ones give the same run."""

from __future__ import annotations

import sys
from functools import partial

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
    "compiled": ("csv", ["--torchcompile"], 1e-5),
    # open_clip rounds its similarities to bfloat16, 8 bits of mantissa, and the fused losses do not
    "bfloat16": ("csv", ["--precision", "amp_bf16"], 2e-2),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_open_clips_trainer_has_the_same_losses_with_the_patch(name, folder, monkeypatch):
    # traced and run as it is: a C++ compiler for a model takes longer than all other runs together
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    kind, extra, tolerance = CASES[name]
    words = runs.arguments(folder, kind, *(extra(folder) if callable(extra) else extra))
    *stock, stock_package = runs.run(folder, f"{name}-stock", False, words)
    *fused, fused_package = runs.run(folder, f"{name}-fused", True, words)
    assert (stock_package["package"], fused_package["package"]) == ("open_clip", "cliperase_fast")
    assert len(fused) == len(stock) == 12
    for ours, theirs in zip(fused, stock, strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    assert fused[0] != fused[-1]  # it trained


def test_two_ranks_train_alike_with_and_without_the_patch(folder):
    extras = {
        "whole": [],
        "local": ["--local-loss", "--gather-with-grad"],
        "local-without-gradients": ["--local-loss"],
        "siglip": ["--siglip"],
        "distillation": distilling(folder),
        "distillation-local": [*distilling(folder), "--local-loss", "--gather-with-grad"],
        "accumulation": ["--accum-freq", 2, "--batch-size", 8],
    }
    cases = {name: runs.arguments(folder, "csv", "--epochs", 1, *extra) for name, extra in extras.items()}
    assert_ranks_train_alike(folder, cases)


def assert_ranks_train_alike(folder, cases):
    for name, (*ranks,) in runs.run_ranks(folder, cases).items():
        for stock, fused in (ranks[:2], ranks[2:]):
            assert (stock.pop()["package"], fused.pop()["package"]) == ("open_clip", "cliperase_fast"), name
            assert len(fused) == len(stock) == (6 if "accumulation" in name else 3), name
            tolerance = CASES["bfloat16"][-1] if "bfloat16" in name else 1e-5
            for ours, theirs in zip(fused, stock, strict=True):
                assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance), name


KINDS = {"clip": lambda place: [], "siglip": lambda place: ["--siglip"], "distillation": distilling}


@pytest.mark.long
def test_two_ranks_train_alike_in_every_kind_of_data_precision_and_accumulation(folder):
    ways = {
        "shards": ("webdataset", []),
        "accumulation": ("csv", ["--accum-freq", 2, "--batch-size", 8]),
        "bfloat16": ("csv", ["--precision", "amp_bf16"]),
    }
    cases = {
        f"{kind}-{way}": runs.arguments(folder, data, "--epochs", 1, *KINDS[kind](folder), *extra)
        for kind in KINDS
        for way, (data, extra) in ways.items()
        if (kind, way) != ("distillation", "accumulation")  # which open_clip refuses
    }
    assert_ranks_train_alike(folder, cases)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_of_a_whole_run_is_the_stock_one(kind, folder):
    """54 steps."""
    words = runs.arguments(folder, "csv", *KINDS[kind](folder), "--epochs", 9)
    *stock, stock_package = runs.run(folder, f"{kind}-stock", False, words)
    *fused, fused_package = runs.run(folder, f"{kind}-fused", True, words)
    assert (stock_package["package"], fused_package["package"]) == ("open_clip", "cliperase_fast")
    assert len(fused) == len(stock) == 54
    for ours, theirs in zip(fused, stock, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert sum(fused[-1].values()) < sum(fused[0].values())


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


def test_modules_loaded_while_patched_are_restored_too(monkeypatch):
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


@pytest.mark.parametrize("version", ["2.32.0", "5.0.0"])
def test_an_unsupported_version_is_refused_by_the_range(version, monkeypatch):
    from cliperase_fast import extras

    monkeypatch.setattr(extras.importlib.metadata, "version", lambda package: version)
    with pytest.raises(cf.InputError, match=rf"{version} is not supported: .*open_clip_torch>=3\.0,<5\.0"):
        open_clip_losses.check_version()


def test_the_command_line_runs_the_trainer_patched(folder, monkeypatch, capfd):
    words = runs.arguments(folder, "csv", "--name", "command-line", "--epochs", 1)
    with runs.recording() as losses:
        assert cli.main(["train-open-clip", "--", *words]) == 0
    assert losses[-1] == {"package": "cliperase_fast"}
    assert found(open_clip.factory)["ClipLoss"] is open_clip.loss.ClipLoss is STOCK["ClipLoss"]  # and it cleaned up
    assert (folder / "logs" / "command-line" / "checkpoints" / "epoch_1.pt").is_file()


def test_shards_with_a_reader_that_open_clip_does_not_take_are_refused(monkeypatch):
    monkeypatch.setattr(integration, "_reader_marks_shard_ends", lambda: True)
    with pytest.raises(cf.InputError, match=r"webdataset<=0\.2\.86"):
        integration.train_open_clip(["--train-data", "/data/{0..9}.tar"])


def test_unlearning_inside_open_clips_loop_forgets_and_keeps(folder):
    import open_clip_train.main as trainer

    from cliperase_fast.integrations.open_clip_unlearning import unlearning

    lines = (folder / "train.csv").read_text().splitlines()
    (folder / "forget.csv").write_text("\n".join([lines[0], *(line for line in lines if "red number" in line)]))
    (folder / "retain.csv").write_text("\n".join(line for line in lines if "red number" not in line))
    words = runs.arguments(
        folder, "csv", "--train-data", folder / "retain.csv", "--name", "unlearn", *distilling(folder),
        "--pretrained", folder / "teacher.pt", "--epochs", 4,
    )  # fmt: skip
    with runs.recording() as losses, unlearning(str(folder / "forget.csv"), 4, cf.CLIPEraseLoss(1.0, 3.0, 3.0)):
        making = "create_task" if hasattr(trainer, "create_task") else "create_loss"  # of open_clip 4 and 3
        create = getattr(trainer, making)
        seen = []

        def watched(*args, **options):
            made = create(*args, **options)
            loss = made.loss if making == "create_task" else made
            loss.register_forward_hook(
                lambda module, inputs, output: seen.append({k: v.item() for k, v in output.items()})
            )
            return made

        setattr(trainer, making, watched)
        assert trainer.main(words) is None
    assert len(losses) == 1  # of the recorder itself: open_clip's own losses were not asked
    assert len(seen) == 20 and seen[0].keys() == {"forget_loss", "retain_loss", "consistency_loss"}
    assert seen[0]["consistency_loss"] == pytest.approx(0, abs=1e-5)  # the student starts as the teacher
    assert seen[-1]["forget_loss"] < seen[0]["forget_loss"] - 0.3
    assert seen[-1]["retain_loss"] < seen[0]["retain_loss"] + 0.2


class Loader(list):
    """As open_clip's loaders, of batches in its newer form."""

    def __init__(self, marks, count):
        super().__init__(
            {"image": torch.full((count, 2), float(mark)), "text": torch.full((count, 3), mark)} for mark in marks
        )
        self.num_batches, self.num_samples = len(self), count * len(self)


def test_a_trainer_that_makes_tasks_of_dict_batches_unlearns_too(monkeypatch):
    """open_clip 4: `create_task` instead of `create_loss`, and batches by name."""
    from types import SimpleNamespace

    from cliperase_fast.integrations import open_clip_unlearning

    def get_data(args, transforms, epoch=0, tokenizer=None, naflex_data_config=None):
        loader = Loader([7], 2) if args.train_data == "forget.csv" else Loader([0, 1], 3)
        return {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}

    def create_task(args, model, dist_model=None, naflex_data_config=None):
        return SimpleNamespace(loss=None, model=model)

    trainer = SimpleNamespace(create_task=create_task, get_data=get_data)
    monkeypatch.setattr(open_clip_unlearning, "import_trainer", lambda: trainer)
    args = SimpleNamespace(distill=True, train_data="retain.csv", world_size=1, use_naflex=False)
    with open_clip_unlearning.unlearning("forget.csv", 2):
        task = trainer.create_task(args, "student", dist_model="teacher")
        found = trainer.get_data(args, (None, None), epoch=0, tokenizer=None, naflex_data_config=None)["train"]
    assert (trainer.create_task, trainer.get_data) == (create_task, get_data)
    assert task.model == "student" and isinstance(task.loss, open_clip_unlearning.UnlearningLoss)
    assert task.loss.forget_pairs == 2
    batches = list(found.dataloader)
    assert [batch["text"][:, 0].tolist() for batch in batches] == [[7, 7, 0, 0, 0], [7, 7, 1, 1, 1]]
    assert [batch["image"][:, 0].tolist() for batch in batches] == [[7, 7, 0, 0, 0], [7, 7, 1, 1, 1]]
    args.use_naflex = True
    with open_clip_unlearning.unlearning("forget.csv", 2), pytest.raises(cf.InputError, match="--use-naflex"):
        trainer.get_data(args, (None, None))


def test_the_unlearning_loss_takes_the_head_of_the_batch_as_forget_pairs():
    from cliperase_fast.integrations.open_clip_unlearning import UnlearningLoss

    g = torch.Generator().manual_seed(0)
    features = [torch.nn.functional.normalize(torch.randn(9, 6, generator=g), dim=1) for _ in range(4)]
    loss = cf.CLIPEraseLoss(0.5, 2.0, 1.5)
    terms = UnlearningLoss(3, loss)(*features[:2], 10.0, *features[2:], 8.0, output_dict=True)
    expected = loss(features[0][:3], features[1][:3], *(part[3:] for part in features), 10.0, 8.0)
    assert sum(terms.values()).item() == pytest.approx(expected.total.item(), rel=1e-6)
    assert terms["forget_loss"].item() == pytest.approx(2.0 * expected.forget.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("extra", "says"), [([], "--distill-model"), (["--local-loss"], "--local-loss"), (["--siglip"], "--siglip")]
)
def test_unlearning_refuses_what_it_cannot_do(extra, says, folder):
    import open_clip_train.main as trainer

    from cliperase_fast.integrations.open_clip_unlearning import unlearning

    get_data = trainer.get_data
    teacher = distilling(folder) if extra else []
    words = runs.arguments(folder, "csv", "--name", f"refused{says}", *teacher, *extra)
    with pytest.raises(cf.InputError, match=says), unlearning(str(folder / "train.csv"), 4):
        trainer.main(words)
    assert trainer.get_data is get_data
