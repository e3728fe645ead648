"""What is read off records: effects, statistics, verdicts, and the parts that pages are made of."""
