"""One script for each table or figure. Scripts write their tables to `benchmarks/results/`."""
