"""In-process runtime, experiments and the command line."""
