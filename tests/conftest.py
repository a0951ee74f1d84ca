"""Without a GPU, Triton's interpreter runs the kernels on CPU tensors.

Triton decides when it is imported, also about its own library functions, so this happens before anything else imports
it. The variable is taken away again at once: operators on CPU tensors then run their definitions as they do for users,
and only the tests that ask for the kernels (tests/kernels) interpret them.
"""

import importlib
import importlib.util
import os

import pytest
import torch

KERNEL_MODULES = (
    "selection.kernel",
    "selection.score",
    "selection.top",
    "glue.kernel",
    "input_linear.kernel",
    "input_linear.row",
    "expert_ffn.kernel",
    "neuron_ffn.kernel",
    "attention.kernel",
    "attention.rope",
    "attention.row",
    "spark_attention.kernel",
    "stream",
)

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    previous = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    for module in KERNEL_MODULES:
        importlib.import_module(f"sparse_kernels.{module}")
    if previous is None:
        del os.environ["TRITON_INTERPRET"]
    # Triton's interpreter replaces the functions of its language at every call of a device function, which takes longer
    # than the functions. Once for all of them is enough: those of the language itself know it by its other name.
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    if hasattr(interpreter, "_LangPatchScope"):  # since Triton 3.7
        for function in (importlib.import_module("sparse_kernels.blocks").activate.fn, language.sum.fn):
            interpreter._patch_lang(function)
        interpreter._patch_lang = lambda function: interpreter._LangPatchScope()

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device on which operators run their kernels in this test, every `torch.empty` full of poison."""
    triton = pytest.importorskip("triton")
    if not torch.cuda.is_available():
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
            pytest.skip("Triton 3.6's interpreter fails on loops with run-time bounds under numpy 2.4 and later.")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)
    return "cuda" if torch.cuda.is_available() else "cpu"
