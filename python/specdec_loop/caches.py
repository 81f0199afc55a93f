"""Where the tokens of a forward stand, and a cache that is written in place, for requests of any mix of lengths."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec_kernels import DraftTree, TreeLayout
from specdec_kernels.trees import tree_layout


class Step(NamedTuple):
    """Where the tokens of one forward stand.

    On a `SlotCache` the forward runs on N packed tokens, [1, N]. On transformers' own caches, which give all requests
    the same slots, it runs on [B, q] tokens: `rows` and `slots` are None, `packed` and `moves` say what else is needed.
    """

    rows: Tensor | None  # [N] int64, cache row
    slots: Tensor | None  # [N] int64, slot within the row
    tree: DraftTree | None  # what each token sees besides its prefix; None: the prefill of one request
    prefix_lens: Tensor | None  # [B] int32, committed slots; rows 0..B-1 of the cache are in use
    nodes: Tensor | None = None  # [N] int64, places of the tokens in the packed tree; None: it is run as a whole
    layout: TreeLayout | None = None  # of the tree, once for all layers
    packed: Tensor | None = None  # [N] int64, places of the nodes among the B * q tokens; None: all tokens are nodes
    moves: Tensor | None = None  # [B, q+1] int32, how the tree's keys get behind their prefix; None: there they are


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, Hkv, length, D], allocated at the first write and never again."""

    is_sliding = False

    def __init__(self, rows: int, length: int):
        super().__init__()
        self.rows, self.length = rows, length
        self.step: Step | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes, dtype and device of the first states."""
        # Zeros, because a kernel may multiply what stands in a slot that nobody sees by a weight of zero.
        self.keys, self.values = (
            states.new_zeros(self.rows, states.shape[1], self.length, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write [1, Hkv, N, D] at the step's slots; return the whole buffers, in a prefill the states themselves."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.step
        self.keys[step.rows, :, step.slots] = key_states[0].transpose(0, 1)
        self.values[step.rows, :, step.slots] = value_states[0].transpose(0, 1)
        return (key_states, value_states) if step.tree is None else (self.keys, self.values)

    def get_seq_length(self) -> int:
        """0: rows differ in length, and positions are always given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Asked for by mask builders only, and this attention has none."""
        return self.length, 0

    def get_max_length(self) -> int:
        """Slots of a row."""
        return self.length

    get_max_cache_shape = get_max_length  # the name before transformers 5.20


class SlotCache(Cache):
    """A cache of some requests with `length` slots each, dense, for any mix of lengths.

    What stands above a row's entry of `last_positions` [rows] int64 gives no token that is kept. Drafts there are run
    at that position, so that speculation never reads past a table of positions that plain decoding stays within.
    """

    def __init__(self, length: int, last_positions: Tensor):
        super().__init__(layers=[])
        self.rows, self.length, self.last_positions = len(last_positions), length, last_positions
        self.step: Step | None = None

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """See SlotLayer.update."""
        while len(self.layers) <= layer_idx:
            self.layers.append(SlotLayer(self.rows, self.length))
        self.layers[layer_idx].step = self.step
        return self.layers[layer_idx].update(key_states, value_states)

    def buffers(self, rows: int) -> list[Tensor]:
        """Keys and values of all layers, the first `rows` rows of each: views."""
        return [buffer[:rows] for layer in self.layers if layer.is_initialized for buffer in (layer.keys, layer.values)]

    def move_row(self, source: int, destination: int, length: int) -> None:
        """Copy the first `length` slots of one row to another, which keeps the rows in use dense."""
        for buffer in self.buffers(self.rows):
            buffer[destination, :, :length] = buffer[source, :, :length]
        self.last_positions[destination] = self.last_positions[source]


def tree_step(
    tree: DraftTree, prefix_lens: Tensor, nodes: Tensor | None = None, layout: TreeLayout | None = None
) -> tuple[Tensor, Step]:
    """Positions [N] and the step of a tree, or of some of its nodes, behind each request's prefix.

    `layout` stands for the tree's own: that of a graph (`specdec_kernels.trees.draft_blocks` and others), made with
    these prefix_lens.
    """
    count = tree.tokens.shape[0]
    layout = tree_layout(tree, prefix_lens) if layout is None else layout
    places = torch.arange(count, device=tree.tokens.device)
    if len(prefix_lens) == 1:  # most steps of a single request are short, and each small op of theirs counts
        rows, slots = torch.zeros_like(places), places + prefix_lens
    else:
        batch = torch.arange(len(prefix_lens), device=places.device)
        rows = batch.repeat_interleave(tree.cu_nodes.diff(), output_size=count)
        slots = places + (prefix_lens - tree.cu_nodes[:-1])[rows]
    positions = layout.positions.long()
    if nodes is not None:
        rows, slots, positions = rows[nodes], slots[nodes], positions[nodes]
    return positions, Step(rows, slots, tree, prefix_lens, nodes, layout)
