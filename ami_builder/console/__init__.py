"""Progress, results and errors for people, CI and programs; no other package prints.

Progress and errors go to stderr, results to stdout. rich is imported only where output is drawn.
"""

from ami_builder.console.progress import Progress, Step
from ami_builder.console.renderers import open_progress
from ami_builder.console.results import error, is_terminal, note, result, result_json, table, verdict
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
    "is_terminal",
    "note",
    "open_progress",
    "result",
    "result_json",
    "size",
    "table",
    "verdict",
]
