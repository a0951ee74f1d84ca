"""Feed-forward networks that compute only selected neurons."""
