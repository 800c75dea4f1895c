"""Fused operations: each file holds one, with its plain PyTorch reference beside it. No model knowledge here."""
