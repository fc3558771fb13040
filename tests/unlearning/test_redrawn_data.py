"""`unlearn()` and `evaluate()` on a dataset that augments its images when they are read."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUICK, interrupted_after, make_pairs, make_tiny_clip, split_pairs

import cliperase_fast as cf
from cliperase_fast import InputError
from cliperase_fast.unlearning.trainer import Trainer

ROWS = dict(zip(("forget", "retain"), split_pairs(make_pairs(), "red"), strict=True))


class Augmented:
    """Shifts the brightness of each image at random; `views` are those of the item that was read, with its colour."""

    def __init__(self, part, as_tensor):
        self.rows, self.as_tensor, self.views = ROWS[part], as_tensor, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        pixels, caption = self.rows[index]
        pixels = pixels + random.gauss(0, 0.5)
        self.views.append(index)
        if self.as_tensor:
            return pixels, caption
        values = (127 + 60 * pixels).clamp(0, 255).byte().permute(1, 2, 0)
        return Image.fromarray(values.numpy()), caption


def run(as_tensor=True, **changes):
    data = Augmented("forget", as_tensor), Augmented("retain", as_tensor)
    return cf.unlearn(make_tiny_clip(), *data, **{**QUICK, **changes}), data


@pytest.mark.parametrize("as_tensor", [False, True], ids=["PIL", "tensor"])
def test_every_step_draws_new_views_which_the_teacher_sees_too(as_tensor, monkeypatch):
    steps, seen = [], Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda *given: steps.append(given[2][0]) or seen(*given))
    result, _ = run(as_tensor, epochs=6)
    views = {}
    for batch in steps:
        for index, pixels in zip(batch.pairs, batch.pixels, strict=True):
            views.setdefault(int(index), []).append(pixels)
    several = [of_image for of_image in views.values() if len(of_image) > 1]
    assert several
    assert all(not torch.equal(of_image[0], of_image[1]) for of_image in several)
    first = next(line for line in result.history if "total" in line)
    assert first["consistency"] == pytest.approx(0, abs=1e-6)  # before any step the student is the teacher


def test_a_step_reads_each_image_once():
    (_, short), (_, long) = (run(epochs=epochs, evaluate_every=9, lambda_consistency=lam)
                             for epochs, lam in ((1, 3), (3, 3)))  # fmt: skip
    each = [sum(len(data.views) for data in pair) for pair in (short, long)]
    result, _ = run(epochs=1)
    steps = sum("total" in line for line in result.history)
    assert each[1] - each[0] == 2 * steps * QUICK["batch_size"]


def test_repeated_and_resumed_runs_have_the_same_bits(tmp_path):
    whole, again = (run(epochs=3)[0] for _ in range(2))
    with interrupted_after(3):
        run(epochs=3, output_dir=tmp_path / "run")
    resumed, _ = run(epochs=3, output_dir=tmp_path / "run", resume=True)
    for other in (again, resumed):
        assert other.before == whole.before
        assert other.after == whole.after
        for mine, theirs in zip(other.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)


def test_evaluation_sees_the_same_view_each_time():
    scores = [cf.evaluate(make_tiny_clip(), Augmented("retain", False), progress=False) for _ in range(2)]
    assert scores[0] == scores[1]


def test_a_transform_with_its_own_generator_is_a_warning():
    generator = torch.Generator()
    rows = [Augmented(part, as_tensor=False) for part in ROWS]
    plain = [[of_part[index] for index in range(len(of_part))] for of_part in rows]

    def jitter(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 + torch.randn(3, 1, 1, generator=generator)

    with pytest.warns(UserWarning, match="does not follow the seeds"):
        cf.unlearn(make_tiny_clip(), *plain, transform=jitter, **{**QUICK, "epochs": 1})


def test_teacher_features_of_redrawn_images_cannot_be_cached():
    with pytest.raises(InputError, match="the dataset draws its images anew each time"):
        run(teacher_cache="memory")


def test_worker_processes_draw_the_same_views():
    here, there = run(epochs=1)[0], run(epochs=1, num_workers=1)[0]
    assert here.history[0]["total"] == there.history[0]["total"]
