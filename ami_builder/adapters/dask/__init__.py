"""A running Dask cluster: what it says about itself, and what each of its workers reads about its machine."""
