"""Methods of activation sparsity behind one interface."""
