"""Tests of the blocks in which the GPU backends work: their shapes, the rule of keep="auto", aligned copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sweep_cases import random_batch

from cliperase_fast.ops import blocks
from cliperase_fast.ops.blocks import FeatureGradients, block_shape, in_blocks, kept_bytes
from cliperase_fast.ops.matmul import as_pair
from cliperase_fast.ops.spec import Need

MIB = 1 << 20


@pytest.mark.parametrize("n", [1, 100, 4096, 8191, 1 << 20, 1 << 31])
@pytest.mark.parametrize("budget", [MIB, 128 * MIB, 12_000 * MIB])
@pytest.mark.parametrize("strip_rows", [0, 1, 1000])
@pytest.mark.parametrize("wave", [0, 5632, 16_896])
def test_blocks_fit_their_memory_whatever_the_number_of_pairs(n, budget, strip_rows, wave):
    rows, columns = block_shape(n, n, 10, budget, wave=wave, strip_rows=strip_rows)
    assert rows % 64 == 0 and columns % 128 == 0
    assert rows <= n + 63 and columns <= n + 127
    assert rows * columns * 10 <= budget or rows == 64 or (strip_rows and columns == 128)
    if not strip_rows and rows < n:  # no less than half of it is used
        assert rows * columns * 10 > budget / 2 or budget == MIB


# 132 multiprocessors and tiles of 128 x 256: three tiles a row of tiles at width 768, so 44 rows of tiles are a wave
@pytest.mark.parametrize(
    ("n", "m", "pair_bytes", "wave", "shape"),
    [
        (32_768, 32_768, 2, 5632, (5632, 11_264)),
        (1 << 20, 1 << 20, 2, 5632, (5632, 11_264)),
        (1 << 20, 1 << 20, 2, 8448, (8192, 8192)),  # a wave of both does not fit
        (1 << 20, 1 << 20, 4, 5632, (5632, 5632)),
        (1024, 1 << 20, 2, 5632, (1024, 61_952)),  # few rows: more columns, whole waves of them
        (1 << 20, 1024, 2, 5632, (61_952, 1024)),
        (1000, 1003, 2, 0, (1024, 1024)),
    ],
)
def test_blocks_give_every_multiprocessor_a_tile_where_they_can(n, m, pair_bytes, wave, shape):
    assert block_shape(n, m, pair_bytes, 128 * MIB, wave=wave) == shape
    assert shape[0] * shape[1] * pair_bytes <= 128 * MIB


def test_a_wave_is_that_of_the_device_and_the_width(monkeypatch):
    properties = type("Properties", (), {"multi_processor_count": 132})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda", 0)
    waves = {width: blocks.full_wave(gpu, width) for width in (64, 512, 768, 1024, 1 << 20)}
    assert waves == {64: 16_896, 512: 8448, 768: 5632, 1024: 4224, 1 << 20: 128}
    assert blocks.full_wave(torch.device("cpu"), 768) == 0


def test_blocks_cover_everything_once_and_do_not_mix_cached_rows_with_others():
    met = torch.zeros(70, 50, dtype=torch.int64)
    for rows, columns in in_blocks(70, 50, (32, 20), cached_rows=48):
        met[rows, columns] += 1
        assert rows.stop <= 48 or rows.start >= 48
    assert (met == 1).all()


def inputs(n: int, keep: str):
    return replace(random_batch(n).to(torch.float32), keep=keep)


@pytest.mark.parametrize(
    ("budget", "free", "kept"),
    [(600 * 2400, 2 * 600 * 2400, 600), (600 * 2400 - 1, 1 << 40, 0), (1 << 40, 2 * 600 * 2400 - 1, 0)],
)
def test_auto_keeps_all_rows_where_budget_and_half_of_the_free_memory_hold_them(monkeypatch, budget, free, kept):
    monkeypatch.setattr(blocks, "cache_budget", lambda device: budget)
    monkeypatch.setattr(blocks, "free_bytes", lambda device, enough: free)
    assert kept_bytes(inputs(600, "auto"), 2400) == kept * 2400
    assert kept_bytes(inputs(600, "nothing"), 2400) == 0
    for keep in ("similarities", "compact"):  # no backend but "triton" has the compact form
        assert kept_bytes(inputs(600, keep), 2400) == (600 if budget >= 600 * 2400 else 512) * 2400


def test_free_memory_is_what_the_driver_and_torch_have_and_unknown_when_compiling(monkeypatch):
    gpu, capturing = torch.device("cuda", 0), False
    properties = type("Properties", (), {"total_memory": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 450)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert blocks.free_bytes(gpu, 51) == 350 and blocks.free_bytes(torch.device("cpu"), 1) == 0
    assert blocks.free_bytes(gpu, 50) == 50  # torch has enough itself, so the driver is not asked
    capturing = True
    assert blocks.free_bytes(gpu, 1) == 500
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert blocks.free_bytes(gpu, 1) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["odd width", "odd stride", "odd start", "transposed"])
def test_features_that_gpus_cannot_copy_in_whole_pieces_are_copied_with_zeros_behind(dtype, kind):
    wide = torch.randn(9, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    odd = {
        "odd width": wide[:, :33].contiguous(), "odd stride": wide[:, :40].contiguous()[:, :32],
        "odd start": wide.flatten()[1:-15].unflatten(0, (-1, 16)), "transposed": wide[:, :16].T,
    }[kind]  # fmt: skip
    odd_pair, fine = as_pair(odd, odd[:2]), wide[:, :32]
    for found, given in zip(odd_pair, (odd, odd[:2]), strict=True):
        assert found.stride(1) == 1 and found.stride(0) % 16 == found.data_ptr() % 16 == found.shape[1] % 16 == 0
        assert torch.equal(found[:, : given.shape[1]], given) and not found[:, given.shape[1] :].any()
    assert all(found is fine for found in as_pair(fine, fine))


def test_gradients_from_blocks_are_those_of_the_whole_and_have_no_padding():
    batch = random_batch(30, width=20)
    image, text = as_pair(batch.image.float(), batch.text.float())
    whole = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    for need in (Need(), Need(False, False, True)):
        found = FeatureGradients(image, text, 20, torch.tensor(3.0), need, (torch.bfloat16, torch.float32))
        for rows, columns in in_blocks(30, 30, (16, 13), cached_rows=5):
            found.add(rows, columns, whole[rows, columns])
        of_scale = (whole.double() * (batch.image @ batch.text.T)).sum()
        torch.testing.assert_close(found.scale.double(), of_scale, rtol=0, atol=1e-5)
        if need.image:
            expected = 3 * whole @ text[:, :20], 3 * whole.T @ image[:, :20]
            assert found.image.dtype == torch.bfloat16 and found.image.is_contiguous()
            torch.testing.assert_close(found.image, expected[0].bfloat16())
            given = found.text
            assert given.is_contiguous()
            torch.testing.assert_close(given, expected[1])
        else:
            assert found.image.numel() == found.text.numel() == 0
