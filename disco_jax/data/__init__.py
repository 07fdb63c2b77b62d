"""Data sets and input pipelines. They know nothing of nodes."""
