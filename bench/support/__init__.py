"""What the benchmarks share: clocks, peers, checks, cases, results."""
