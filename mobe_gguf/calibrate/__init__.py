"""Running a model over a text: what its matrices are fed."""
