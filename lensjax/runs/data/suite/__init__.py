"""Questions over a text whose answers are known: the suite on which papers compare what remembers."""

from lensjax.runs.data.suite.puzzles import TASKS as TASKS
from lensjax.runs.data.suite.source import SuiteSource as SuiteSource
from lensjax.runs.data.suite.source import draw as draw
