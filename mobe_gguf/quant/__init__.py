"""Types: which a tensor gets, and what it costs."""
