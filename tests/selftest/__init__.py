"""The selftest against the cloud on loopback, and against one that differs on purpose."""
