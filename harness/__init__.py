"""Measures methods of activation sparsity: FLOPs, bytes, latency and accuracy on one machine."""
