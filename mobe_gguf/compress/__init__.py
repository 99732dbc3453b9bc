"""One command from a model to a measured file: calibrate, choose, fit, round, write, verify, measure.

``pipeline`` runs the stages in a work folder, ``rivals`` makes the plain files that the result is compared with, ``report``
prints the result.
"""
