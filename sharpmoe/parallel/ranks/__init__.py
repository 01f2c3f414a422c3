"""The process's place among all ranks, and what ranks do for each other."""
