"""Run a model over a text and record the inputs of its matrices."""
