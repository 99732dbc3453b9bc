"""Factorizing a whole checkpoint: one unit is one projection of one layer; what is finished stays finished.

Beside OUT grows ``OUT.work/``: ``job.json`` with the settings, ``units/`` with one safetensors file for each finished
unit, complete or absent, already under the tensor names of the final checkpoint.  A killed job is taken up from there.
When all units are there OUT is assembled and the work directory goes.
"""

from __future__ import annotations

from mobe_gguf.core.workspace import work_directory
from mobe_gguf.factorize.job.preparing import prepare
from mobe_gguf.factorize.job.running import JobResult, run
from mobe_gguf.factorize.job.state import Job

__all__ = ["Job", "JobResult", "prepare", "run", "work_directory"]
