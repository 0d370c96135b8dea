"""Diagnosis of a running Dask cluster: read its workers' memory, and judge their limits."""
