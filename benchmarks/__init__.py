"""One script for each table or figure; `benchmarks/results/` holds what they printed."""
