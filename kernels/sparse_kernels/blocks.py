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
def load_rows(weight, stride, f, live, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows f [n] of a weight matrix [F, D]: [n, WIDTH], zero beyond D and where not live."""
    d = tl.arange(0, WIDTH)
    inside = live[:, None] & (d < D)[None, :]
    return tl.load(weight + f[:, None] * stride + d[None, :], mask=inside, other=0.0, eviction_policy="evict_first")


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
