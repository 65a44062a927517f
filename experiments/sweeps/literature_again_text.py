"""The default of `literature_text` without its budget term, with other seeds; `literature_again_recall` says why.

make literature
"""

from experiments.sweeps import literature_text
from experiments.sweeps.literature_again_recall import NO_BUDGET
from lensjax.runs.sweep import Sweep

SWEEP = Sweep(
    preset=literature_text.SWEEP.preset,
    changes=dict(literature_text.SWEEP.changes),
    seeds=tuple(range(10, 15)),
    together=(NO_BUDGET,),
)
