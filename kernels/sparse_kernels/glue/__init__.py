"""What stands between the matrices of a decode step: residual and norm, gate times up, each with a selection."""
