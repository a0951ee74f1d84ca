"""Hugging Face publishes a distribution named `kernels` that transformers imports; our folder must not pass for it."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:]
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import import_utils
import sparse_kernels
assert import_utils.is_kernels_available() == (len(sys.argv) > 3)
assert not hasattr(sparse_kernels, "IS_THE_STAND_IN")
if len(sys.argv) > 3:
    import kernels
    assert kernels.IS_THE_STAND_IN, kernels.__path__
"""


def stand_in(folder: Path) -> Path:
    """A distribution named `kernels` in the version transformers asks for, with whatever names it takes from it."""
    from transformers.utils import import_utils

    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.14.0")
    package, metadata = folder / "kernels", folder / f"kernels-{version}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(
        "IS_THE_STAND_IN = True\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    if name[0].isupper():\n"
        "        return type(name, (), {'__init__': lambda self, *args, **kwargs: None})\n"
        "    return lambda *args, **kwargs: (lambda decorated: decorated)\n"
    )
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize("installed", [False, True])
def test_transformers_imports_from_the_repository_root(tmp_path, installed):
    paths = [str(REPO), str(REPO / "kernels")] + ([str(stand_in(tmp_path))] if installed else [])
    done = subprocess.run([sys.executable, "-c", PROGRAM, *paths], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_no_wheel_of_ours_owns_kernels():
    setuptools = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {name.split(".")[0] for name in setuptools["packages"]} == {"sparse_kernels", "methods", "harness"}
    assert not (REPO / "kernels" / "__init__.py").exists()
