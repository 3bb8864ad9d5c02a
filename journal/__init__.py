"""A run's folder: configuration, rounds, state, results, status."""
