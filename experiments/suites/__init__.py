"""What the benchmark measures: its cases and their reports."""
