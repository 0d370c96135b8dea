"""Pure values and rules: no file, process or network is touched here."""
