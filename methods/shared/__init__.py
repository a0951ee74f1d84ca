"""What several methods need: calibration statistics, clustering of neurons, the training loop."""
