"""The unattended pipeline."""
