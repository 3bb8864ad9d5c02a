"""The Flower ServerApp: rounds, sampling, state, resume, telemetry."""
