"""Stand-in models with random weights, for serve, benchmarks and tests."""
