"""Turning the experts of a MoE checkpoint into MoBE factors.

``solver.fit`` factorizes one stack of experts.  ``job.run`` factorizes a whole checkpoint, unit by unit, and can resume.
``plan.make_plan`` computes the result's sizes beforehand.
"""
