"""A kernel that only reads."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(data, sums, ELEMENTS: tl.constexpr, STEPS: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([ELEMENTS], tl.float32)
    for step in tl.static_range(STEPS):
        offsets = (program * STEPS + step) * ELEMENTS + tl.arange(0, ELEMENTS)
        total += tl.load(data + offsets, eviction_policy="evict_first")
    tl.store(sums + program, tl.sum(total, 0))
