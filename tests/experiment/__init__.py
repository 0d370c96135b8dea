"""The experiment: does a memory limit help? Run it with `python -m tests.experiment`.

The findings are in docs/explanation/experiment.md, the recorded runs in the folder `recorded`.
"""
