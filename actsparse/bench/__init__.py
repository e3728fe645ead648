"""Timings: interleaved, in one process, as ratios of medians with an interval."""
