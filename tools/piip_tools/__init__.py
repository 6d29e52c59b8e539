"""Analysis of PIIP models: FLOPs, memory, plans for a budget, and benchmarks."""
