"""One HTML page for the record of a run or of a nightly run."""
