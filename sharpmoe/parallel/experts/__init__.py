"""Expert parallelism: process groups and dispatchers."""
