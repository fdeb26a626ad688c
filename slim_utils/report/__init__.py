"""HTML report of runs and benchmarks."""
