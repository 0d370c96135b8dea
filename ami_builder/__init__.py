"""Build VM images for Dask with the right memory limit, and verify them on a booted VM or instance."""

__version__ = "0.1.0"
