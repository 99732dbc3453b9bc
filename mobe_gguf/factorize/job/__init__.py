"""Factorize a whole checkpoint in units: one unit is one projection of one layer.  Finished units are kept.

``OUT.work/`` beside OUT has ``job.json`` with the settings, and ``units/`` with one safetensors file for each finished unit.
A unit's file is complete or absent, and has the tensor names of the final checkpoint.  A killed job resumes from there.
When all units are finished, OUT is assembled and the work directory is removed.
"""

from __future__ import annotations

from mobe_gguf.core.workspace import work_directory
from mobe_gguf.factorize.job.preparing import prepare
from mobe_gguf.factorize.job.running import JobResult, run
from mobe_gguf.factorize.job.state import Job

__all__ = ["Job", "JobResult", "prepare", "run", "work_directory"]
