"""ptx.faults finds each kind of missing wait in PTX from which it was taken out, and nothing in PTX that is right."""

import pytest

from fastgpt.triton_kernels.ptx import faults

PIPELINE = """
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 8192;
	@%p1 cp.async.bulk.tensor.4d.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd1, {%r3, %r3}], [%r1];
$L__BB0_1:                              // the loop over keys
{
	waitLoop:
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r4], %r5;
	@!complete bra.uni waitLoop;
}
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r10,%r11}, %rd2, %rd3, %p2, 1, 1;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	mul.f32 	%r12, %r10, %r13;
	bar.sync 	0;
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6], 8192;
	cp.async.bulk.tensor.4d.shared::cta.global.mbarrier::complete_tx::bytes [%r7], [%rd1, {%r3, %r8}], [%r6];
	@%p3 bra 	$L__BB0_1;
	ret;
"""

ROWS = """
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	cp.async.commit_group;
$L__BB0_1:
	cp.async.wait_group 	0;
	bar.sync 	0;
	ld.shared.v4.b32 	{%r3, %r4, %r5, %r6}, [%r1];
	bar.sync 	0;
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x10, %r2;
	cp.async.commit_group;
	@%p1 bra 	$L__BB0_1;
	ret;
"""

BLACKWELL = """
	@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p2;
	@%p1 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r3];
	mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3], %r4;
	tcgen05.ld.sync.aligned.16x32bx2.x2.b32 {%r5, %r6}, [%r1], 32;
	tcgen05.wait::ld.sync.aligned;
	@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p2;
	ret;
"""

WAIT_AFTER_USE = ("	wgmma.wait_group.sync.aligned 0;\n", "	mul.f32 	%r12, %r10, %r13;\n")


def without(ptx: str, start: str, which: int = 0) -> str:
    """`ptx` without its line number `which` of those that begin with `start`."""
    lines = ptx.splitlines(keepends=True)
    del lines[[i for i, line in enumerate(lines) if line.strip().startswith(start)][which]]
    return "".join(lines)


@pytest.mark.parametrize("ptx", [PIPELINE, ROWS, BLACKWELL])
def test_nothing_is_found_where_every_wait_is_in_its_place(ptx):
    assert faults(ptx) == []


@pytest.mark.parametrize(
    "ptx, words",
    [
        (without(PIPELINE, "wgmma.wait_group"), "mul.f32 takes %r10 before the wait"),
        (without(PIPELINE, "wgmma.wait_group"), "writes shared memory that products of an earlier turn may still read"),
        (without(PIPELINE, "wgmma.wait_group"), "ends before the wait for its last products"),
        (PIPELINE.replace("wait_group.sync.aligned 0", "wait_group.sync.aligned 1"), "mul.f32 takes %r10"),
        (without(PIPELINE, "wgmma.commit_group"), "mul.f32 takes %r10 before the wait"),
        (PIPELINE.replace("".join(WAIT_AFTER_USE), "".join(WAIT_AFTER_USE[::-1])), "mul.f32 takes %r10"),
        (without(PIPELINE, "mbarrier.try_wait"), "multiplies before any wait for the copies"),
        (without(PIPELINE, "mbarrier.try_wait"), "a loop's copies signal 1 barriers, and it waits for 0"),
        (without(PIPELINE, "mbarrier.arrive.expect_tx"), "signals %r1, which expects no bytes"),
        (without(PIPELINE, "mbarrier.arrive.expect_tx", 1), "signals %r6, which expects no bytes"),
        (without(ROWS, "cp.async.wait_group"), "a loop copies by cp.async and never waits for it"),
        (without(ROWS, "bar.sync"), "ld.shared.v4.b32 reads copies that other warps waited for, without a barrier"),
        (without(BLACKWELL, "@%p1 tcgen05.commit"), "tcgen05.ld loads sums of products that were not committed"),
        (without(BLACKWELL, "tcgen05.wait::ld"), "tcgen05.mma may overwrite sums that are still being loaded"),
        (PIPELINE.replace("mul.f32", "st.local.b32"), "st.local.b32: local memory"),
    ],
)
def test_a_missing_wait_is_found(ptx, words):
    assert any(words in fault for fault in faults(ptx))
