"""Selections: from scores and thresholds to index lists."""
