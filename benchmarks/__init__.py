"""Comparisons of speed and memory, as ratios within one run. Not part of the package, and no tests."""
