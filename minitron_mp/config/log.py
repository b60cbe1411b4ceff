"""The section log: experiment trackers beside metrics.jsonl and TensorBoard."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from minitron_mp.config.base import Section

Name = Annotated[str, Field(min_length=1)]

TRACKERS = {"wandb": "wandb", "mlflow": "mlflow"}
"""Key of the section -> the package that it needs."""


class LogConfig(Section):
    """Experiment trackers that receive the metrics of `correct` and `distill`.

    metrics.jsonl and TensorBoard files are always written. The section does not change a result.
    """

    wandb: Name | None = None
    """Project of Weights & Biases. Its own settings, such as WANDB_MODE=offline, are environment
    variables. Default: none."""
    mlflow: Name | None = None
    """Experiment of MLflow on the server MLFLOW_TRACKING_URI. Default: none."""
    name: Name | None = None
    """Name of the runs in the trackers, followed by the section that is trained. Default: the last
    part of `output`."""

    @model_validator(mode="after")
    def _name_is_used(self) -> LogConfig:
        if self.name is not None and not self.trackers:
            raise ValueError("name: no effect without wandb or mlflow; drop it, or set one of them")
        return self

    @property
    def trackers(self) -> list[str]:
        """The keys of the trackers that are used."""
        return [key for key in TRACKERS if getattr(self, key) is not None]
