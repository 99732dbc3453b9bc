"""Turning the experts of a MoE checkpoint into MoBE factors.

``solver.fit`` factorizes one stack of experts; ``job.run`` a whole checkpoint, unit by unit, resumable;
``plan.make_plan`` tells beforehand what comes out.
"""
