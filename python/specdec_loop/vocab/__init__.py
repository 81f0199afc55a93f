"""The trimmed vocabulary of a drafter's head: what to count, how many rows to keep, and the files that say so.

VocabTrim (arXiv 2506.22694) and FR-Spec (2502.14856) let a drafter draw from a part of the vocabulary only. Output
stays lossless, a draft step reads fewer rows, and what is not among them is never accepted: the choice of the size
weighs one against the other. `python -m specdec_loop vocab choose` does all of it; these are its parts.
"""

from .choice import Choice, acceptance_of, block_efficiency, choose_size, run_coverage, size_grid
from .counts import Counts, count_tokens, load_counts, merge_counts, save_counts
from .formats import read_eagle3, read_token_map, write_eagle3, write_token_map
from .identity import tokenizer_hash
from .intersection import Intersection, intersect, load_intersection, save_intersection
from .latency import Latency, measure_head, time_calls
from .maps import VocabMap, load_map, load_rows, save_map
from .rows import check_rows, forced_ids, frequency_order, select_rows
from .steps import Costs, Steps, loop_steps, measure_acceptance, measure_costs
from .text import encode_texts, generate_texts, passages, read_pieces, split
from .trim import TrimmedHead, trimmed_head

__all__ = [
    "Choice",
    "Costs",
    "Counts",
    "Intersection",
    "Latency",
    "Steps",
    "TrimmedHead",
    "VocabMap",
    "acceptance_of",
    "block_efficiency",
    "check_rows",
    "choose_size",
    "count_tokens",
    "encode_texts",
    "forced_ids",
    "frequency_order",
    "generate_texts",
    "intersect",
    "load_counts",
    "load_intersection",
    "load_map",
    "load_rows",
    "loop_steps",
    "measure_acceptance",
    "measure_costs",
    "measure_head",
    "merge_counts",
    "passages",
    "read_eagle3",
    "read_pieces",
    "read_token_map",
    "run_coverage",
    "save_counts",
    "save_intersection",
    "save_map",
    "select_rows",
    "size_grid",
    "split",
    "time_calls",
    "tokenizer_hash",
    "trimmed_head",
    "write_eagle3",
    "write_token_map",
]
