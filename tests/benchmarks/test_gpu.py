"""Times on a GPU against the accepted ones of its model: the runtime's decode step, and each operator alone."""

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import tiny
import torch
from baselines import Baseline

from harness.decoder import Runner
from harness.kernel_bench import OPERATORS
from harness.latency import GPU_STEPS, Bench
from methods.runtime import runtime

LAYER = dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)  # Llama-2-7B
LAYERS, CONTEXT, BLOCKS = 4, 512, 5
SHAPE, DENSITY = "llama2-7b", 0.5

pytestmark = pytest.mark.usefixtures("no_grad")


class RuntimeOnly(Bench):
    """The stock runners are not ours to guard."""

    def _runners(self, prefix: str, handle: Any) -> list[Runner]:
        with runtime(self.model, handle) as blocks:
            return [self._graph(f"{prefix} runtime", False, blocks, handle)]

    def _quantised(self) -> list[Runner]:
        return []


def guard(case: str, measure: Callable[[], float], baseline: Baseline, benchmark: Any) -> None:
    """Holds a case to its baseline; every time goes into pytest-benchmark's JSON too."""
    times: list[float] = []

    def timed() -> float:
        times.append(measure())
        return times[-1]

    problem = benchmark.pedantic(baseline.check, args=(case, timed))
    benchmark.extra_info.update(gpu=baseline.gpu, ms=times)
    assert problem is None, problem


@pytest.mark.parametrize("name", tiny.DENSITY)
def test_decode_step(name: str, baseline: Baseline, benchmark: Any) -> None:
    model = tiny.llama(**LAYER, num_hidden_layers=LAYERS).to("cuda", torch.bfloat16)
    bench = RuntimeOnly(model, tiny.prompt(model, length=CONTEXT), None)
    with tiny.attached(model, name) as handle:
        runner = bench._runners("sparse", handle)[0] if handle.layers() else bench.dense[0]

        def measure() -> float:
            samples: list[float] = []
            for _ in range(BLOCKS):
                runner.rewind()
                samples += runner.block(GPU_STEPS)
            return median(samples)

        measure()  # the clocks rise
        guard(f"decode step, {name}", measure, baseline, benchmark)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name: str, baseline: Baseline, benchmark: Any) -> None:
    from harness.kernel_bench import case, measure

    setting = measure.Setting(torch.device("cuda"), torch.bfloat16, bandwidth=1e12)  # of the limit, not used here
    found = case.cases([name], [SHAPE])
    chosen = next((c for c in found if c.batch == 1 and c.density == DENSITY), found[0])

    def milliseconds() -> float:
        record, problem = measure.measure(chosen, setting)
        assert problem is None, problem
        return record["time_us"] / 1e3

    guard(chosen.label, milliseconds, baseline, benchmark)
