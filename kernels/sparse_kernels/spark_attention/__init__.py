"""Attention to the tokens that the statistics of a part of the scores let through."""
