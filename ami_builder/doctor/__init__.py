"""Diagnosis of a live Dask cluster: whether its workers' memory limits are right."""
