"""Whole studies on one model: those of MoBE's paper, and the demo."""
