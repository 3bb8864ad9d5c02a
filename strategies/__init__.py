"""One file for each aggregation method: pure arithmetic on adapters."""
