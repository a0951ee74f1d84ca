"""What a clone brings along: light, and in formats that run nothing when they are read."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
BINARY = {".safetensors", ".png", ".npy", ".npz", ".gz", ".zip"}
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"}


def shipped() -> list[Path]:
    folders = ("harness", "methods", "kernels", "results/cpu", "results/h200", "docs", "tests")
    return [p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def test_a_clone_stays_light() -> None:
    sizes = {p: p.stat().st_size for p in shipped() if p.suffix in BINARY}
    pictures = sum(size for p, size in sizes.items() if p.suffix == ".png")
    assert pictures < 1e6 and sum(sizes.values()) - pictures < 36e6
    models = [p for p in sizes if p.name == "model.safetensors"]
    assert len(models) == 2 and all(sizes[p] < 16e6 for p in models)


def test_what_is_installed_is_all_packages() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    roots = [ROOT / "kernels" / "sparse_kernels", ROOT / "methods", ROOT / "harness"]
    found = {".".join(p.parent.relative_to(root.parent).parts) for root in roots for p in root.rglob("__init__.py")}
    assert listed == found


def test_no_file_is_a_pickle() -> None:
    assert not [p for p in shipped() if p.suffix in PICKLES]
