"""Methods of activation sparsity behind one interface.

from methods import load_artifact, sparsify, sparsify_

with sparsify(model, load_artifact(folder)):
    model.generate(...)
"""

from .artifact import Artifact
from .base import Method, SparseModel, load_artifact, sparsify, sparsify_
from .errors import UsageError

__all__ = ["Artifact", "Method", "SparseModel", "UsageError", "load_artifact", "sparsify", "sparsify_"]
