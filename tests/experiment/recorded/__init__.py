"""The recorded runs that docs/explanation/experiment.md is about."""
