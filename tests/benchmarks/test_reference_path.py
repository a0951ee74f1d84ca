"""The reference path against dense in the same run, on a CPU: a coarse bound, since it masks and skips nothing."""

from statistics import median
from time import perf_counter
from typing import Any

import pytest
import tiny
import torch

BOUND = {"null": 3.0, "teal": 3.0, "lte": 3.0}  # times the dense step; 1.2 when this was written

pytestmark = pytest.mark.usefixtures("no_grad")


def synchronised() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


@pytest.mark.benchmark(timer=synchronised)
@pytest.mark.parametrize("name", BOUND)
def test_step_over_dense(name: str, benchmark: Any) -> None:
    model, untouched = tiny.llama(), tiny.llama()
    dense: list[float] = []
    with tiny.attached(model, name):
        decoder, dense_decoder = tiny.decoder(model), tiny.decoder(untouched)

        def dense_step() -> None:  # before every round: A B A B
            start = synchronised()
            dense_decoder.step(untouched.forward)
            dense.append(synchronised() - start)

        benchmark.pedantic(lambda: decoder.step(model.forward), setup=dense_step, rounds=30, warmup_rounds=3)
    if benchmark.stats is None:
        pytest.skip("benchmarks are disabled.")
    ratio = benchmark.stats.stats.median / median(dense[3:])
    benchmark.extra_info["over_dense"] = ratio
    assert ratio < BOUND[name]
