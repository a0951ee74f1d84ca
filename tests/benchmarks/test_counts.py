"""What needs no clock: FLOPs, bytes, launches, graph breaks, recompiles and imports, held to exact numbers.

A number here changes only on purpose; whoever changes it says why in the commit.
"""

import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness import cost
from methods.runtime import runtime
from sparse_kernels import launch

# Per decoded token at context 512, half of the units of every site active.
COSTS = {
    "dense": {"flops": 448_000, "bytes": 633_856},
    "null": {"flops": 448_000, "bytes": 633_856},
    "teal": {"flops": 374_272, "bytes": 486_400},
    "lte": {"flops": 399_872, "bytes": 537_600},
}
# Calls of our operators in a decode step of two blocks: q, k, v at once | attention | o | gate, up | down; before them
# the tables of the rotation, after them the last norm.
AROUND = {"rotary_table": 1, "row_stats": 1, "residual_norm": 1}
FUSED = AROUND | {"threshold_linear": 8, "token_attention": 2}
EXPERTS = AROUND | {"threshold_linear": 4, "token_attention": 2, "residual_norm": 3, "add_parts": 2}
# Without a selection the FFN is one operator, whose parts are added to the residual.
WHOLE = EXPERTS | {"neuron_ffn": 2}
OPERATORS = {"dense": WHOLE, "null": FUSED, "teal": FUSED, "lte": EXPERTS}
# Of kernels, as the interpreter launches them. A linear layer with a selection is one product and one sum, which for
# gate and up the layer after makes, and for q, k and v the rotation: these groups have several heads, so that it comes
# before the attention. A dense block is 6: q, k, v | attention | o | residual, norm | FFN | residual.
LAUNCHES = {"dense": 15, "null": 19, "teal": 19}

pytestmark = pytest.mark.usefixtures("no_grad")


class Calls(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "sparse_kernels":
            self.counts[op.name().partition("::")[2]] += 1
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("name", COSTS)
def test_flops_and_bytes_of_a_decode_step(name: str) -> None:
    model = tiny.llama()
    shape = cost.Shape.of(model)
    with tiny.attached(model, name) as handle:
        for layer in handle.layers():
            active = layer.units if name == "null" else layer.units // 2
            handle.meter.counts[layer.site, layer.layer] = [torch.tensor([active])]
        decode = cost.record(handle, shape, 512, 1)[0]["decode"]
    assert {key: decode[key] for key in ("flops", "bytes")} == COSTS[name]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_called_in_a_decode_step(name: str) -> None:
    model = tiny.llama()
    with tiny.attached(model, name) as handle, runtime(model, handle if handle.layers() else None):
        decoder = tiny.decoder(model)
        with Calls() as calls:
            decoder.step(model.forward)
    assert calls.counts == OPERATORS[name]


@pytest.mark.parametrize("name", LAUNCHES)
def test_kernels_launched_in_a_decode_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip("Triton 3.6's interpreter fails on loops with run-time bounds under numpy 2.4 and later.")
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled, and other shapes of launch are theirs.")
    model, run, launched = tiny.llama(), launch.run, Counter[str]()

    def counting(kernel: Any, *args: Any, **options: Any) -> None:
        launched[kernel.__name__] += 1
        run(kernel, *args, **options)

    for path, module in list(sys.modules.items()):
        if path.startswith("sparse_kernels.") and getattr(module, "run", None) is run:
            monkeypatch.setattr(module, "run", counting)
    with tiny.attached(model, name) as handle, runtime(model, handle if handle.layers() else None):
        decoder = tiny.decoder(model)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        decoder.step(model.forward)
    assert launched.total() == LAUNCHES[name], launched


@pytest.mark.parametrize("fused", [False, True], ids=["layers", "runtime"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_compiled_step_has_no_breaks_and_is_compiled_once(name: str, fused: bool) -> None:
    model, counters = tiny.llama(), torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    with tiny.attached(model, name) as handle:
        with runtime(model, handle if handle.layers() else None) if fused else handle.sparse():
            decoder = tiny.decoder(model)
            forward = torch.compile(model.forward, backend="eager", dynamic=False)
            for _ in range(3):
                decoder.step(forward)
    torch._dynamo.reset()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def test_listing_methods_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "triton", "numpy", "lm_eval", "datasets", "matplotlib", "rich"}
    code = f"import sys; from harness.cli import main; main(['ls', 'methods']); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
