"""A running Dask cluster: as an executor, and what it and each of its workers read about themselves."""

INSTALL = "pip install 'ami-builder[dask]'"
"""What brings the library that speaks to clusters."""
