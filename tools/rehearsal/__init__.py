"""A federation on this machine, from start scripts to the last round, for tests and tools."""
