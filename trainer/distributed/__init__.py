"""Several workers: their cluster, their processes, their strategy and its collectives."""
