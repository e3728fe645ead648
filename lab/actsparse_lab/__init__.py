"""The laboratory of actsparse: runs, records, campaigns and pages."""
