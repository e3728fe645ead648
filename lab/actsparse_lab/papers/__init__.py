"""The papers' experiments, a folder each: runs, claims, the words of its page, and plots."""
