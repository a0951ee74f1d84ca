"""Pieces of Triton code that several kernels share. Imports triton: only `kernel.py` files import this."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait until the kernels before this one have finished; call it before reading or writing what they touch.

    With programmatic dependent launch (PDL) this kernel's programs start while the previous kernel still runs, so all
    that needs no result of it (thresholds, norm weights, index arithmetic) belongs before this line. In a kernel that
    was not launched so, the wait returns at once and the kernel after it may still start early.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fetch(memory, size, THREADS: tl.constexpr):
    """Ask for `size` bytes (a multiple of 16) at `memory` to be brought into the L2 cache, each program for its share.

    Nothing waits for them: they arrive while kernels run that leave the memory idle. Needs Hopper or newer.
    """
    programs = tl.num_programs(0) * tl.num_programs(1)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    piece = tl.cdiv(size, programs * THREADS * 16) * 16
    start = (program * THREADS + tl.arange(0, THREADS)) * piece
    tl.inline_asm_elementwise(
        "{ .reg .pred some; setp.gt.s32 some, $2, 0;"
        " @some cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [memory.to(tl.int64) + start, tl.minimum(size - start, piece)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def activate(v, NAME: tl.constexpr):
    """The activation called NAME (see `ACTIVATIONS`) of float32 values."""
    if NAME == "silu":
        v = v * tl.sigmoid(v)
    elif NAME == "gelu":
        v = 0.5 * v * (1.0 + tl.math.erf(v * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # 0.5 * (1 + tanh(z)) = sigmoid(2 z)
        v = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu2")
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if NAME == "relu2":
            v = v * v
    return v


@triton.jit
def last_to_arrive(semaphore, arrivals):
    """True in the last of `arrivals` programs to call this; what the others stored before is then visible to it.

    semaphore: int32, zero before the first program and again after the last, so it serves the next launch as it is.
    Reads of the others' stores must bypass the first-level cache (cache_modifier=".cg").
    """
    tl.debug_barrier()
    last = tl.atomic_add(semaphore, 1, sem="acq_rel") == arrivals - 1
    if last:
        tl.store(semaphore, 0)
    return last
