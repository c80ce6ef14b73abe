"""Measurements against peers; every timing is a ratio, interleaved in one run."""
