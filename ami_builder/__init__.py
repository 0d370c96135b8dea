"""Bake VM images for Dask whose memory limit is right, and prove it on a booted machine."""

__version__ = "0.1.0"
