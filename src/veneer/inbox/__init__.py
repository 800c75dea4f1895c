"""Rows made from a seed, so that recipes and demo need no file: the inbox of an online shop, as JSON or classes."""
