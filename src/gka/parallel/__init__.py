"""Training on many GPUs: meshes, tensor parallelism by heads, FSDP2, pipelines, sharded checkpoints, jobs."""

from gka.parallel.clipping import clip_grad_norm_
from gka.parallel.context import ContextParallel, even_ranges
from gka.parallel.job import Job, current, joined, start
from gka.parallel.mesh import Layout, layout_of, make_mesh
from gka.parallel.parallelize import parallelize
from gka.parallel.state import load_state, save_state, whole_weights
from gka.parallel.weights import FirstWeights, materialize, without_memory

__all__ = [
    "ContextParallel",
    "even_ranges",
    "parallelize",
    "make_mesh",
    "Layout",
    "layout_of",
    "materialize",
    "without_memory",
    "FirstWeights",
    "clip_grad_norm_",
    "save_state",
    "load_state",
    "whole_weights",
    "start",
    "current",
    "joined",
    "Job",
]
