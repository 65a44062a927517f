"""A first LensNet on a folder of one's own, in minutes on two cores: `demo` on other text.

    python -m experiments.train notes --data.path ~/notes

Windows quote themselves, so that something old is always needed and can be learned in minutes. Text as it is, whose
needs are rarer, takes the sizes of `stdlib`.
"""

from experiments.presets import demo
from lensjax import _settings
from lensjax.runs.data.task import DataConfig

CONFIG = _settings.replace(
    demo.CONFIG, output_dir="runs/notes", eval_batches=4, data=DataConfig(task="text", path="notes", quote=8)
)
