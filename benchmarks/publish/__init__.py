"""What becomes of the rows: the schema, report and pictures, comparison of two runs, quotes."""
