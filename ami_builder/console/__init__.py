"""Progress, results and errors, for a person, for CI and for a program: the only package that prints.

Progress and errors go to stderr, results to stdout. rich is imported only where something is drawn.
"""

from ami_builder.console.progress import Progress, Step
from ami_builder.console.renderers import open_progress
from ami_builder.console.results import error, note, result, result_json, table, verdict
from ami_builder.console.style import Mode, amount, choose_mode, clean, duration, size

__all__ = [
    "Mode",
    "Progress",
    "Step",
    "amount",
    "choose_mode",
    "clean",
    "duration",
    "error",
    "note",
    "open_progress",
    "result",
    "result_json",
    "size",
    "table",
    "verdict",
]
