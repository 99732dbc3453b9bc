"""What is measured on a model at hand: the paper's studies, the demo."""
