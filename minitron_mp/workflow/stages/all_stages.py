"""What each stage does once its inputs are there: read artefacts, compute, write one. pipeline.py decides whether and when.

Every function is reached by all ranks of the world and leaves its artefact whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable

from minitron_mp.workflow.context import StageContext
from minitron_mp.workflow.stages.cache import cache_teacher
from minitron_mp.workflow.stages.correct import correct_teacher
from minitron_mp.workflow.stages.depth import measure_depth
from minitron_mp.workflow.stages.distill import distill_student
from minitron_mp.workflow.stages.evaluate import evaluate_models
from minitron_mp.workflow.stages.export import export_student
from minitron_mp.workflow.stages.import_hf import import_hf
from minitron_mp.workflow.stages.prune import prune_teacher
from minitron_mp.workflow.stages.score import score_teacher
from minitron_mp.workflow.stages.search import search_sizes
from minitron_mp.workflow.stages.tokenize import tokenize_text

RUN: dict[str, Callable[[StageContext], None]] = {
    "import": import_hf,
    "import-teacher": import_hf,
    "data": tokenize_text,
    "texts": tokenize_text,
    "score": score_teacher,
    "correct": correct_teacher,
    "depth": measure_depth,
    "search": search_sizes,
    "prune": prune_teacher,
    "cache": cache_teacher,
    "distill": distill_student,
    "evaluate": evaluate_models,
    "export": export_student,
}
