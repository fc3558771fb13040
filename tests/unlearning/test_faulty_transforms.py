"""A transform that fails for one image, and processes that cannot load images, end in an error that names them."""

import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUICK, make_tiny_clip

import cliperase_fast as cf

FORGET = [(Image.new("RGB", (9, 9), (200, green, 0)), "a red square") for green in range(12)]
RETAIN = [(Image.new("RGB", (9, 9), (0, green + 20, 200)), "a blue square") for green in range(12)]


class Picky:
    """Fails for the image with a green of 7."""

    def __init__(self, fault):
        self.fault = fault

    def __call__(self, image):
        pixels = torch.from_numpy(np.asarray(image)[:8, :8].copy()).permute(2, 0, 1) / 255
        return self.fault(pixels) if np.asarray(image)[0, 0, 1] == 7 else pixels


def raises(pixels):
    raise ValueError("too dark")


def nothing(pixels):
    return None


def not_a_number(pixels):
    return pixels * torch.nan


def larger(pixels):
    return torch.zeros(3, 9, 9)


def dies(pixels):
    os._exit(9)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (raises, r"the transform fails for image '7' of .* \(ValueError: too dark\); it must turn"),
        (nothing, "the transform returned a NoneType for image '7' of "),
        (not_a_number, "the transform returned values that are not finite .* for image '7' of "),
        (larger, r"images of one batch have different shapes, \(3, 8, 8\) and \(3, 9, 9\)"),
    ],
)
def test_the_image_is_named(fault, says, num_workers):
    options = {"transform": Picky(fault), "num_workers": num_workers}
    with pytest.raises(cf.UnlearningError, match=f"training stopped before step .*{says}.* Repair it, also with on_e"):
        cf.unlearn(make_tiny_clip(), FORGET, RETAIN, **QUICK, **options)
    with pytest.raises(cf.InputError, match=says):
        cf.evaluate(make_tiny_clip(), FORGET, **options, progress=False)


def test_skipping_is_not_advised_where_it_is_on(tmp_path):
    options = {"transform": Picky(raises), "on_error": "skip", "output_dir": tmp_path}
    with pytest.raises(cf.UnlearningError, match=r"Repair it and go on with resume=True$"):
        cf.unlearn(make_tiny_clip(), FORGET, RETAIN, **QUICK, **options)


def test_a_loader_process_that_dies_is_an_error_with_the_remedy():
    with pytest.raises(cf.UnlearningError, match=r"a process that loads images died .* use num_workers=0"):
        cf.evaluate(make_tiny_clip(), FORGET, transform=Picky(dies), num_workers=1, progress=False)


@pytest.mark.filterwarnings("ignore:Got pickle error")
def test_loader_processes_that_cannot_start_are_an_error_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "Process", multiprocessing.context.SpawnProcess)
    fault = Picky(lambda pixels: pixels)
    with pytest.raises(cf.UnlearningError, match=r"cannot be started .*pickle.*: use num_workers=0, or a dataset and"):
        cf.evaluate(make_tiny_clip(), FORGET, transform=fault, num_workers=1, progress=False)
