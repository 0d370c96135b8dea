"""Takes a machine through its phases, runs the checks on it, and combines the results into one verdict."""
