"""Ahead-of-time compilation for Hopper, in a process of its own: the tests' process interprets the kernels."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def launches():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "hopper.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def for_checks(record) -> bool:
    """Products of float32 matrices have no matrix units and may spill registers: they check results, slowly."""
    products = ("routed_hidden_kernel", "routed_down_kernel", "score_kernel", "token_kernel")
    return record["kernel"] in products and {"torch.bfloat16", "torch.float16"}.isdisjoint(record["dtypes"])


def test_every_kernel_compiles(launches):
    import sparse_kernels

    sources = Path(sparse_kernels.__file__).parent.rglob("*.py")
    kernels = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)}
    assert {record["kernel"] for record in launches} == kernels and len(kernels) >= 5
    assert all(record["target"] == "sm_90a" for record in launches)


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "torch.float16"])
@pytest.mark.parametrize("kernel", ["linear_kernel", "hidden_kernel", "score_kernel"])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_weights_load_sixteen_bytes_at_a_time(launches, kernel, dtype, batch):
    found = [r for r in launches if (r["kernel"], r["batch"]) == (kernel, batch) and dtype in r["dtypes"]]
    assert bool(found) == ((kernel, batch) != ("linear_kernel", 1))  # `listed_kernel` serves one row
    assert all(r["wide_loads"] >= 4 for r in found)
    assert all(r["matrix"] == (batch > 1) for r in found)


def test_caches_load_sixteen_bytes_at_a_time(launches):
    found = [r for r in launches if r["kernel"] == "attention_kernel"]
    assert found and all(r["wide_loads"] >= 24 for r in found)  # merging partial results takes fewer
    assert all(r["matrix"] for r in found if set(r["dtypes"]) & {"torch.bfloat16", "torch.float16"})


def test_caches_of_listed_tokens_load_sixteen_bytes_at_a_time(launches):
    for kernel in ("spark_score_kernel", "spark_attend_kernel"):
        found = [r for r in launches if r["kernel"] == kernel]
        assert len(found) >= 8 and all(r["wide_loads"] >= 12 for r in found)


def test_products_are_rounded_before_their_sum(launches):
    """As torch does: multiplying and adding in one operation of half precision would round only once."""
    assert not [r for r in launches if r["half_fma"]]


def test_weights_without_a_list_load_sixteen_bytes_at_a_time(launches):
    found = [r for r in launches if r["kernel"] == "masked_kernel"]
    assert len(found) >= 8 and all(r["wide_loads"] >= 32 for r in found)


@pytest.mark.parametrize(
    "kernel",
    ["rows_kernel", "listed_kernel", "fused_kernel", "first_kernel", "routed_hidden_kernel", "routed_down_kernel"],
)
def test_neurons_load_sixteen_bytes_at_a_time(launches, kernel):
    found = [r for r in launches if r["kernel"] == kernel and not for_checks(r)]
    assert found and all(r["wide_loads"] >= 8 for r in found)
    assert all(r["matrix"] == kernel.startswith("routed") for r in found)


def test_no_kernel_spills_registers_or_outgrows_shared_memory(launches):
    few = 16  # bytes that Triton 3.6 leaves on the stack of some kernels
    angles = "rotary_kernel"  # cosines of large angles keep digits of 2 / pi there
    assert not [r for r in launches if r["stack"] > few and not for_checks(r) and r["kernel"] != angles]
    assert not [r for r in launches if r["shared"] > 227 * 1024]
