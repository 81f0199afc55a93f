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
from .optimum import optimal_acceptance
from .types import (
    DraftTree,
    HeadPart,
    HeadSample,
    HeadTopK,
    Lossy,
    Philox,
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
    "SamplingParams",
    "SharedPrefix",
    "TreeLayout",
    "Verified",
    "backends",
    "caote_scores",
    "compact_kv_",
    "head_part",
    "head_sample",
    "head_topk",
    "keydiff_scores",
    "optimal_acceptance",
    "tree_attention",
    "trees",
    "verify_chain",
    "verify_tree",
]

# Last: a compiled module registers its kernels on schemas, and the imports above declare them.
backends.initialise()
