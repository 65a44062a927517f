"""Configurations of runs on text and on recall, and a folder of text."""

from pathlib import Path

from lensjax.runs.config import Config
from lensjax.runs.data.task import DataConfig
from lensjax.training.scoring import ContextConfig

RECALL = ContextConfig(window=64, block_size=8, horizon=6, recent_tokens=2)


def text_config(path, *, window=32, max_files=None) -> Config:
    context = ContextConfig(window=window, block_size=4, horizon=3, recent_tokens=1)
    return Config(context=context, data=DataConfig(task="text", path=str(path), max_files=max_files))


def recall_config(**kwargs) -> Config:
    return Config(context=RECALL, data=DataConfig(task="recall", **kwargs))


def write_numbered(folder: Path) -> Path:
    """200 files; file i holds 100 bytes of value i + 1, so that a byte says which file it is from."""
    for i in range(200):
        path = folder / f"{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([1 + i]) * 100)
    return folder
