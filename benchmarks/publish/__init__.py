"""The rows that the suite writes, and what is made of them: report, pictures, comparison of two runs, quotes."""
