"""Benchmarks: programs timed in turn in one process, as ratios of medians with an interval."""
