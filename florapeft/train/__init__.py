"""Fine-tuning jobs on transformers' Trainer: what the `flora` command runs, usable without it.

from florapeft.train import load_job, run_job
run_job(load_job("job.yaml", ["train.learning_rate=1e-3"]))
"""

from florapeft.train.evaluate import evaluate_adapter
from florapeft.train.job import DataSpec, Job, load_job, parse_job
from florapeft.train.merge import merge_adapter
from florapeft.train.orthonormal import OrthonormalFactors
from florapeft.train.run import run_job

__all__ = [
    "DataSpec",
    "Job",
    "OrthonormalFactors",
    "evaluate_adapter",
    "load_job",
    "merge_adapter",
    "parse_job",
    "run_job",
]
