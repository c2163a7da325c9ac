"""Counting in machine code, and what the kernels may take."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from triton import __version__ as triton_version

from benchmarks.assembly import Body, blocks, bodies, main_bodies, read_amdgcn, read_sass
from tests.processes import python

# Listings, of which most of the arithmetic is left out -------------------------------------------------

LOOP = """
nll_kernel:
.text.nll_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0070*/                   LDG.E.64 R4, desc[UR6][R4.64] ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
        /*0150*/              @!P0 STG.E desc[UR6][R4.64], RZ ;
        /*0170*/               @P0 EXIT ;
        /*0180*/                   STG.E desc[UR6][R2.64+0x4], RZ ;
        /*0190*/                   EXIT ;
.L_x_0:
        /*0470*/                   LDG.E.U16 R21, desc[UR6][R4.64] ;
        /*04c0*/              @!P1 BRA `(.L_x_1) ;
.L_x_2:
        /*05f0*/                   ISETP.GE.AND P4, PT, R17.reuse, R25, PT ;
        /*0620*/              @!P4 LDG.E.128 R4, desc[UR6][R28.64] ;
        /*06a0*/              @!P3 LDG.E.128 R8, desc[UR6][R28.64+0x800] ;
        /*0710*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0720*/                   PRMT R27, R4.reuse, 0x7632, R27 ;
        /*07f0*/                   FSEL R28, R6, -INF , !P4 ;
        /*0e90*/                   MUFU.EX2 R32, R31 ;
        /*1ef0*/              @!P2 BRA `(.L_x_2) ;
.L_x_1:
        /*2140*/              @!P3 STG.E desc[UR6][R4.64], R0 ;
        /*21b0*/                   EXIT ;
.L_x_3:
        /*21c0*/                   BRA `(.L_x_3);
        /*21d0*/                   NOP;
.L_x_4:
"""

PIPELINE = """
        /*0dc0*/              P3   LDGSTS.E.BYPASS.128 [R25], desc[UR8][R2.64], P3 ;
        /*0e40*/                   LDGSTS.E.BYPASS.128 [R25+0x4000], desc[UR8][R6.64], P4 ;
        /*0e90*/                   LDGSTS.E.BYPASS.128 [R25+0x8000], desc[UR8][R8.64], P1 ;
        /*0eb0*/                   LDGSTS.E.BYPASS.128 [R25+0xc000], desc[UR8][R10.64], P2 ;
        /*0f00*/              @!P1 BRA `(.L_x_6) ;
.L_x_7:
        /*0fb0*/                   DEPBAR.LE SB0, 0x1 ;
        /*1040*/                   LDS.128 R4, [R31] ;
        /*1050*/                   LDS.128 R8, [R31+0x4000] ;
        /*1060*/                   PRMT R33, R7.reuse, 0x7632, R33 ;
        /*1fa0*/                   LDGSTS.E.BYPASS.128 [R11], desc[UR8][R4.64], P2 ;
        /*1fd0*/                   LDGSTS.E.BYPASS.128 [R11+0x4000], desc[UR8][R6.64], P3 ;
        /*1ff0*/                   LDGDEPBAR ;
        /*2020*/              @!P2 BRA `(.L_x_7) ;
.L_x_6:
        /*22c0*/              @!P3 STG.E desc[UR8][R4.64], R7 ;
.L_x_9:
        /*2450*/              @!P3 LDG.E.128 R8, [R12.64] ;
        /*24e0*/              @!P2 LDG.E.128 R4, [R14.64+0x4000] ;
        /*2f60*/                   MUFU.EX2 R32, R31 ;
        /*3400*/              @!P3 STG.E.128 [R12.64], R8 ;
        /*3430*/              @!P2 STG.E.128 [R14.64+0x4000], R4 ;
        /*3440*/              @!P0 CALL.REL.NOINC `(.L_x_8) ;
        /*3448*/                   IADD3 R26, R26, -0x1, RZ ;
        /*3450*/                   BRA `(.L_x_9) ;
.L_x_8:
        /*3460*/                   EXIT ;
"""

STRAIGHT = """
        /*0280*/                   LDG.E.64 R20, desc[UR4][R20.64] ;
        /*0560*/               @P0 BRA `(.L_x_0) ;
        /*05c0*/              @!P0 STG.E.128 desc[UR4][R2.64], RZ ;
        /*05e0*/              @!P3 STG.E.128 desc[UR4][R2.64+0x800], RZ ;
        /*0620*/                   EXIT ;
.L_x_0:
        /*0830*/              @!P6 LDG.E.128 R4, desc[UR4][R34.64] ;
        /*0840*/                   LDG.E R26, desc[UR4][R12.64] ;
        /*0890*/              @!P5 LDG.E.128 R8, desc[UR4][R34.64+0x800] ;
        /*0d60*/                   FMUL R31, R31, 1.4426950216293334961 ;
        /*2b90*/              @!P6 STG.E.128 desc[UR4][R2.64], R4 ;
        /*2c00*/               @P3 EXIT ;
        /*2c10*/                   STG.E.128 desc[UR4][R2.64+0x1800], R16 ;
        /*2c20*/                   EXIT ;
"""

AMD = """
scale_and_add_kernel:                   ; @scale_and_add_kernel
.Lfunc_begin0:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	s_branch .LBB0_0
.LBB0_0:
	.loc	1 398 5 is_stmt 1               ; kernels.py:398:5
	s_cbranch_scc1 .LBB0_3
; %bb.1:                                ; %.lr.ph
	global_load_ushort v1, v1, s[10:11]
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[10:13], v37, s[12:15], 0 offen
	buffer_load_b128 v[14:17], v38, s[12:15], 0 offen
	v_exp_f32_e32 v1, v1
	buffer_store_short_d16_hi v44, v10, s[4:7], 0 offen
	s_cbranch_scc1 .LBB0_2
.LBB0_3:                                ; %._crit_edge
	s_endpgm
.Lfunc_end0:
	.section	.rodata,"a",@progbits
"""  # fmt: skip


def of_sass(listing: str) -> list[Body]:
    return bodies(blocks(read_sass(listing)))


def test_loop() -> None:
    whole, loop = of_sass(LOOP)
    assert (loop.loop, len(loop.instructions), loop.loads, loop.stores) == (True, 8, {16: 2}, {})
    assert (loop.load_width, loop.store_width, loop.predicated, loop.bytes_loaded) == (16, 0, 2, 32)
    assert loop.count("MUFU|BAR") == 2
    assert (whole.loop, whole.loads, whole.stores) == (False, {8: 1, 2: 1, 16: 2}, {4: 1})
    assert len(whole.instructions) == 15  # to a branch, on from its target through the loop once
    assert main_bodies([whole, loop], elements=16, bytes_read=2) == [loop]


def test_pipeline_and_its_loads_ahead() -> None:
    """The loads before a loop are not in it. A call that does not come back is a branch."""
    whole, *loops = of_sass(PIPELINE.replace("P3   LDGSTS", "     LDGSTS"))
    assert [len(b.instructions) for b in loops] == [8, 8]
    assert [i.opcode for i in whole.instructions[-2:]] == ["CALL.REL.NOINC", "EXIT"]
    assert [(b.loads, b.stores) for b in loops] == [({16: 2}, {}), ({16: 2}, {16: 2})]
    assert main_bodies([whole, *loops], elements=16, bytes_read=2) == loops


def test_straight_line() -> None:
    """The path is that of a row with a label; of its loads the widest are elements."""
    (whole,) = of_sass(STRAIGHT)
    assert (len(whole.instructions), whole.bytes_loaded) == (10, 32)
    assert (whole.loads, whole.stores) == ({8: 1, 16: 2, 4: 1}, {16: 2})
    assert main_bodies([whole], elements=16, bytes_read=2) == [whole]


def test_rows_without_a_label_are_not_followed() -> None:
    """They are zeroed in wider accesses than the others may have."""
    load = "        /*0830*/              @!P6 LDG.E.U16 R4, desc[UR4][R34.64] ;\n"
    (whole,) = of_sass(STRAIGHT.replace(".L_x_0:\n", ".L_x_0:\n" + 40 * load))
    assert (whole.loads[2], whole.bytes_loaded, len(whole.instructions)) == (40, 80, 50)


def test_whole_blocks_are_followed() -> None:
    """Of two ways through a loop with the same loads the one without masks; an edge apart is left out."""
    whole, loop = of_sass("""
.L_x_0:
        /*0000*/                   BRA.U UP0, `(.L_x_1) ;
        /*0010*/                   LDG.E.128 R4, desc[UR4][R34.64] ;
        /*0020*/                   FADD R1, R1, R1 ;
        /*0030*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/               @P0 LDG.E.128 R4, desc[UR4][R34.64] ;
        /*0050*/                   FADD R1, R1, R1 ;
        /*0060*/                   FADD R1, R1, R1 ;
.L_x_2:
        /*0070*/               @P1 BRA `(.L_x_3) ;
        /*0080*/                   LDG.E.U16 R4, desc[UR4][R34.64] ;
.L_x_3:
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
""")
    assert (len(loop.instructions), loop.predicated, loop.loads) == (6, 0, {16: 1})
    assert len(whole.instructions) == 7


def test_remainders_and_edges_are_not_main() -> None:
    """Of loops of a kind the one with the widest loads, without masks; too small ones are none."""
    whole, masked, main, narrow, edge = of_sass("""
.L_x_1:
        /*0000*/               @P1 LDG.E.128 R4, desc[UR4][R34.64] ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R34.64] ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/                   LDG.E.64 R4, desc[UR4][R34.64] ;
        /*0050*/                   LDG.E.64 R4, desc[UR4][R34.64] ;
        /*0060*/                   LDG.E.64 R4, desc[UR4][R34.64] ;
        /*0070*/               @P0 BRA `(.L_x_3) ;
.L_x_4:
        /*0080*/                   LDG.E.U16 R4, desc[UR4][R34.64] ;
        /*0090*/               @P0 BRA `(.L_x_4) ;
        /*00a0*/                   EXIT ;
""")
    assert main_bodies([whole, masked, main, narrow, edge], elements=8, bytes_read=2) == [main]
    assert main_bodies([whole, edge], elements=8, bytes_read=2) == [whole]


def test_amd() -> None:
    _, loop = bodies(blocks(read_amdgcn(AMD)))
    assert (len(loop.instructions), loop.loads, loop.stores) == (5, {16: 2}, {2: 1})
    assert loop.count("MUFU|v_(exp|log|rcp)") == 1


# What the kernels take ---------------------------------------------------------------------------------

# Instructions for each element of plain bfloat16 logits, whatever the vocabulary, by Triton 3.9. For compute
# capability 9.0 they are goals, and no more than was reached; for the others what was reached, and a twentieth.
GOALS = {"nll": 8.0, "gradient": 14.0, "unit gradient": 17.0}
MOST = {
    "80": {"nll": 7.8, "gradient": 14.0, "unit gradient": 17.6},
    "90": {"nll": 7.65, "gradient": 13.65, "unit gradient": 16.75},
    "100": {"nll": 6.9, "gradient": 13.4, "unit gradient": 14.1},
    "120": {"nll": 7.6, "gradient": 13.0, "unit gradient": 15.1},
}
# In rows of up to 128 KiB half the block was a tenth faster on an H100, and costs more instructions.
SHORT = 65536
MOST_IN_SHORT_ROWS = {"80": 19.6, "90": 18.65, "100": 17.4, "120": 16.8}
VOCABULARIES = ["8", "32008", "50257", "50264", "50280", "128256", "262144"]
TINY = 8  # one vector, which lanes share, so that neither counts nor widths for a thread say anything


def count(*args: str, out: Path) -> list[dict[str, Any]]:
    done = python("-m", "benchmarks.kernels", *args, "--out", str(out), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def named(usage: dict[str, Any]) -> str:
    return f"{usage['launch']}, {usage['vocab']} {usage['layout']}: "


def shortcomings(usage: dict[str, Any], most: float) -> list[str]:
    """What decides speed and is not as it should be."""
    total = sum(usage["instructions"])
    widths = {usage["load_width"]} | ({usage["store_width"]} if usage["launch"] != "nll" else set())
    found = {
        "uses float64": usage["has_float64"],
        f"spills {usage['local_bytes']} bytes": usage["local_bytes"] > 0,
    }
    if usage["vocab"] > TINY:
        found |= {
            f"has {total} instructions, {most} allowed": total > most,
            f"accesses {widths} bytes": widths != {16},
            "has loads that are not whole blocks": not usage["whole_blocks"],
        }
    where = f"{usage['launch']}, {usage['vocab']}, {usage['layout']}"
    return [f"{where}: {what}" for what, is_so in found.items() if is_so]


def most(architecture: str, usage: dict[str, Any]) -> float:
    if usage["launch"] == "unit gradient" and usage["vocab"] <= SHORT:
        return MOST_IN_SHORT_ROWS[architecture]
    return MOST[architecture][usage["launch"]]


@pytest.mark.skipif(not triton_version.startswith("3.9."), reason="another compiler than the recorded one")
@pytest.mark.parametrize("architecture", list(MOST))
def test_what_decides_speed(architecture: str, tmp_path: Path) -> None:
    """Few instructions for each element, accesses of 16 bytes, no spills, whatever the vocabulary."""
    args = ("--plain", "--arch", architecture, "--vocab", *VOCABULARIES)
    found = count(*args, out=tmp_path / "kernels.json")
    assert {u["launch"] for u in found} == set(GOALS)
    assert {u["layout"] for u in found} == {"contiguous", "padded", "few rows"}
    missed = [text for u in found for text in shortcomings(u, most(architecture, u))]
    assert not missed, "\n".join(missed)


def test_what_was_reached_is_within_the_goals() -> None:
    assert all(MOST["90"][launch] <= goal for launch, goal in GOALS.items())


def test_float64_is_for_float64_alone() -> None:
    """Neither an argument nor an instruction: not every GPU has it, and few have it at speed."""
    dtypes = ("bfloat16", "float32", "float64")
    code = f"""
from benchmarks.kernels import Case, torch, usages
for dtype in {dtypes}:
    print(dtype, *{{u.has_float64 for u in usages("90", Case(getattr(torch, dtype), "all options", 64))}})
"""
    done = python("-c", code, TRITON_INTERPRET="0")
    assert done.stdout.splitlines() == ["bfloat16 False", "float32 False", "float64 True"], done.stderr


def test_amd_gpus(tmp_path: Path) -> None:
    """No goals for instructions, but the same widths and no spills."""
    gpus = ("gfx942", "gfx950", "gfx1201")
    found = count("--plain", "--vocab", "50257", "--arch", *gpus, out=tmp_path / "kernels.json")
    assert {u["architecture"] for u in found} == set(gpus)
    missed = [f"{u['architecture']}, {text}" for u in found for text in shortcomings(u, math.inf)]
    assert not missed, "\n".join(missed)


def test_peers(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel")
    found = count("--plain", "--peers", "--vocab", "128256", out=tmp_path / "kernels.json")
    theirs = [u for u in found if "Liger" in u["launch"]]
    assert {u["kernel"] for u in theirs} == {"liger_cross_entropy_kernel", "element_mul_kernel"}
    assert {(u["load_width"], u["store_width"], u["whole_blocks"]) for u in theirs} == {(16, 16, True)}
    assert {len(u["instructions"]) for u in theirs if "cross" in u["kernel"]} == {2}
