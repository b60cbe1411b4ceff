"""The names that a recipe accepts are those of the tables, and no name has two meanings."""

from dataclasses import fields
from typing import get_args

from minitron_mp.config.distillation import DistillConfig
from minitron_mp.config.pruning import BatchAggregation, SequenceAggregation
from minitron_mp.config.reference import field_docstrings
from minitron_mp.losses.divergences import DIVERGENCES
from minitron_mp.losses.parameters import PARAMETERS
from minitron_mp.pruning.aggregation import BATCH_AGGREGATIONS, SEQUENCE_AGGREGATIONS
from minitron_mp.training.metrics import StepMetrics
from minitron_mp.training.throughput import Throughput


def test_recipe_accepts_the_aggregations_of_the_tables():
    assert get_args(SequenceAggregation) == (*SEQUENCE_AGGREGATIONS,)
    assert get_args(BatchAggregation) == (*BATCH_AGGREGATIONS,)


def test_recipe_accepts_the_divergences_of_the_table():
    key = DistillConfig.model_fields["divergence"]
    assert get_args(key.annotation) == (*DIVERGENCES,)
    assert PARAMETERS.keys() <= DIVERGENCES.keys()
    description = field_docstrings(DistillConfig)["divergence"]
    assert [name for name in DIVERGENCES if f"{name}: " not in description] == []


def test_divergence_has_the_name_of_no_other_metric():
    """metrics.jsonl has the divergence under its own name, which must not replace a metric."""
    metrics = {field.name for kind in (StepMetrics, Throughput) for field in fields(kind)} | {"time"}
    assert metrics & DIVERGENCES.keys() == set()
