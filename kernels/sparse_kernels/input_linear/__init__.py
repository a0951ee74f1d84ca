"""Linear layers that read only the weights of selected input channels."""
