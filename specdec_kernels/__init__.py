"""The hot operations of LLM speculative decoding as thin PyTorch ops: verify, head, attention, trees, kv.

Every op has a plain PyTorch definition (`reference`) and native backends that agree with it; `python -m
specdec_kernels` prints what this machine has. Importing the package declares all schemas, then loads the compiled
modules, so `torch.ops.specdec_kernels.*` is complete from here on.
"""

from __future__ import annotations

from . import backends, trees
from .attention import tree_attention
from .backends import BackendError
from .head import head_part, head_sample, head_topk
from .kv import compact_kv_
from .kv_scores import caote_scores, keydiff_scores
from .low_rank import low_rank_factors, low_rank_head
from .optimum import optimal_acceptance
from .quantize import quantize_head
from .sharded import merge_head_parts, sharded_head_sample, sharded_head_topk
from .shortlist import RowClusters, Shortlist, cluster_rows, compact_logits, route, scatter_logits
from .types import (
    DraftTree,
    HeadPart,
    HeadSample,
    HeadTopK,
    Lossy,
    Philox,
    QuantizedHead,
    SamplingParams,
    SharedPrefix,
    TreeLayout,
    Verified,
)
from .verify import verify_chain, verify_tree

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "DraftTree",
    "HeadPart",
    "HeadSample",
    "HeadTopK",
    "Lossy",
    "Philox",
    "QuantizedHead",
    "RowClusters",
    "SamplingParams",
    "SharedPrefix",
    "Shortlist",
    "TreeLayout",
    "Verified",
    "backends",
    "caote_scores",
    "cluster_rows",
    "compact_kv_",
    "compact_logits",
    "head_part",
    "head_sample",
    "head_topk",
    "keydiff_scores",
    "low_rank_factors",
    "low_rank_head",
    "merge_head_parts",
    "optimal_acceptance",
    "quantize_head",
    "route",
    "scatter_logits",
    "sharded_head_sample",
    "sharded_head_topk",
    "tree_attention",
    "trees",
    "verify_chain",
    "verify_tree",
]

# Last: a compiled module registers its kernels on schemas, and the imports above declare them.
backends.initialise()
