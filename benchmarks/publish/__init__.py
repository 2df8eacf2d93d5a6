"""What becomes of the rows: the schema, the report with its pictures, the comparison of two runs, the quotes in documents."""
