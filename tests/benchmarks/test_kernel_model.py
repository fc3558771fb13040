"""The counts of machine instructions, and the clocks that follow from them."""

from __future__ import annotations

import pytest

from cliperase_fast.benchmarks.kernel_model import clocks, count
from cliperase_fast.ops.triton.configs import Config

# a loop over tiles around one over features, and around a rarer one with half the products, in a loop of its own
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, [R4] ;
        /*0020*/                   LDS R3, [R5] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0050*/              @!P0 BRA 0x20 ;
        /*0060*/                   MUFU.EX2 R7, R7 ;
        /*0070*/                   SHFL.BFLY PT, R8, R7, 0x1, 0x1f ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0090*/               @P1 BRA 0x80 ;
        /*00a0*/               @P2 BRA 0x80 ;
        /*00b0*/               @P3 BRA.U 0x10 ;
        /*00c0*/                   EXIT ;
"""


def test_instructions_are_counted_by_loop_and_the_rare_loop_is_left_out():
    found = count(SASS)
    assert (found.columns, found.loops) == (128, 1)
    assert found.step == {"shared memory": 1, "tensor core": 2, "other": 1}
    assert found.tile == {"load": 1, "exponential": 1, "shuffle": 1, "other": 1}


def test_more_blocks_at_a_time_hide_what_does_not_overlap():
    config = Config(128, 128, 64, 8, 3)
    alone, two = (clocks(count(SASS), config, blocks) for blocks in (1, 2))
    assert alone["tensor cores"] == 128 * 128 * 2 * 768 / 2048
    assert two["tile"] == pytest.approx(max(alone["tile"] / 2, alone["shared memory"], alone["L2"]))
