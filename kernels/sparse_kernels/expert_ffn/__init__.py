"""Feed-forward networks that compute only selected blocks of neurons."""
