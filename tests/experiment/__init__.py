"""What the experiment asks, and what its answers mean: pure, but for two files that travel to the machine.

`ami-builder experiment` gives Dask the same work under several memory limits, each time on a fresh machine.
"""
