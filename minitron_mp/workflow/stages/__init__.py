"""The stages in the order in which they run, one module each.

Their modules import neither torch nor megatron.
"""

from __future__ import annotations

from minitron_mp.workflow.stage import Stage
from minitron_mp.workflow.stages.cache import CACHE
from minitron_mp.workflow.stages.correct import CORRECT
from minitron_mp.workflow.stages.depth import DEPTH
from minitron_mp.workflow.stages.distill import DISTILL
from minitron_mp.workflow.stages.evaluate import EVALUATE
from minitron_mp.workflow.stages.export import EXPORT
from minitron_mp.workflow.stages.held_out import HELD_OUT
from minitron_mp.workflow.stages.import_hf import IMPORT
from minitron_mp.workflow.stages.import_teacher import IMPORT_TEACHER
from minitron_mp.workflow.stages.plan import PLAN
from minitron_mp.workflow.stages.prune import PRUNE
from minitron_mp.workflow.stages.score import SCORE
from minitron_mp.workflow.stages.search import SEARCH
from minitron_mp.workflow.stages.tokenize import TOKENIZE

STAGES: tuple[Stage, ...] = (
    IMPORT,
    IMPORT_TEACHER,
    TOKENIZE,
    HELD_OUT,
    CORRECT,
    SCORE,
    DEPTH,
    SEARCH,
    PLAN,
    PRUNE,
    CACHE,
    DISTILL,
    EVALUATE,
    EXPORT,
)
"""All stages. Each comes after the stages whose artifacts it reads."""
