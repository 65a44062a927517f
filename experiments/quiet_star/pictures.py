"""Curves of runs that learn to think: reward, entropy, and the accuracy with and without thoughts."""
from pathlib import Path
def training(rows, path: str | Path):
    return None
