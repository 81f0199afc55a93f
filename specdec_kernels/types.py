"""The data that travels between the ops: trees, sampling parameters, random streams, results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class DraftTree(NamedTuple):
    """A ragged batch of draft trees, packed node after node.

    Row i of every per-node tensor belongs to node i. Node 0 of each tree is its root, the last committed token.
    Parents come before their children and siblings stand in the order in which they were drawn.
    Equal siblings may stay separate nodes; where a drafter merges them, `counts` says how many draws hit a node.
    """

    tokens: Tensor  # [N] int32, draft token of each node; the root holds the last committed token
    parents: Tensor  # [N] int32, index within the same tree, -1 at the root
    cu_nodes: Tensor  # [B+1] int32, cumulative node counts: tree b owns nodes cu_nodes[b] .. cu_nodes[b+1]-1
    max_nodes: int  # upper bound of the nodes of one tree, known to the host so that nothing synchronises
    max_depth: int  # upper bound of the depth of one tree (a root alone has depth 0)
    counts: Tensor | None = None  # [N] int32, how often an i.i.d. draw hit this node (default 1)

    @classmethod
    def chain(cls, tokens: Tensor, lengths: Tensor | Sequence[int] | None = None) -> DraftTree:
        """Chains of drafts as trees.

        Args:
            tokens: [B, K+1] integer, the root followed by K draft tokens.
            lengths: [B] nodes to keep of each row, 1..K+1 (default: all K+1). From numbers or a
                tensor on the host nothing is read back; a tensor on a device is read back once, which waits for it.

        Raises:
            TypeError: tokens that are no tensor.
            ValueError: a shape or a length that does not fit.
        """
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens: expected a tensor, got {type(tokens).__name__}")
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens: expected shape [B, K+1] with K >= 0, got {list(tokens.shape)}")
        batch, width = tokens.shape
        if lengths is None:
            parents = torch.arange(-1, width - 1, device=tokens.device, dtype=torch.int32).repeat(batch)
            cu_nodes = torch.arange(batch + 1, device=tokens.device, dtype=torch.int32) * width
            return cls(tokens.to(torch.int32).reshape(-1), parents, cu_nodes, width, width - 1)
        # The sizes of the result depend on the lengths, so the layout is made on the host and copied over.
        host = torch.as_tensor(lengths, dtype=torch.int32, device="cpu")
        if host.shape != (batch,):
            raise ValueError(f"lengths: expected shape [{batch}], got {list(host.shape)}")
        if not bool(((host >= 1) & (host <= width)).all()):
            raise ValueError(f"lengths: expected values in 1..{width}, got {host.tolist()}")
        cu_nodes = torch.zeros(batch + 1, dtype=torch.int32, device="cpu")
        cu_nodes[1:] = host.cumsum(0)
        longest = int(host.max()) if batch else 1
        kept = (torch.arange(width, device="cpu") < host[:, None]).flatten().nonzero()[:, 0].to(tokens.device)
        parents = (kept % width - 1).to(torch.int32)
        return cls(tokens.to(torch.int32).reshape(-1)[kept], parents, cu_nodes.to(tokens.device), longest, longest - 1)

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[Sequence[int]]], roots: Sequence[int], device=None) -> DraftTree:
        """Merge root-to-leaf token paths into one trie for each request.

        Args:
            paths: for each request, token paths below its root; equal prefixes become one node.
            roots: [B] last committed token of each request.

        Raises:
            ValueError: `paths` and `roots` differ in length.
        """
        if len(paths) != len(roots):
            raise ValueError(f"roots: expected one for each of the {len(paths)} requests, got {len(roots)}")
        tokens: list[int] = []
        parents: list[int] = []
        cu_nodes = [0]
        max_depth = 0
        for root, request in zip(roots, paths, strict=True):
            start = len(tokens)
            tokens.append(int(root))
            parents.append(-1)
            children: dict[tuple[int, int], int] = {}
            for path in request:
                node = 0
                for token in path:
                    key = (node, int(token))
                    if key not in children:
                        children[key] = len(tokens) - start
                        tokens.append(int(token))
                        parents.append(node)
                    node = children[key]
                max_depth = max(max_depth, len(path))
            cu_nodes.append(len(tokens))
        widest = max((b - a for a, b in itertools.pairwise(cu_nodes)), default=1)

        def ints(values):
            return torch.tensor(values, dtype=torch.int32, device=device)

        return cls(ints(tokens), ints(parents), ints(cu_nodes), widest, max_depth)

    def depths(self) -> Tensor:
        """[N] int32, edges between each node and its root."""
        from .trees import tree_layout

        return tree_layout(self).depths

    def ancestor_bits(self) -> Tensor:
        """[N, ceil(max_nodes/64)] int64: bit j of node i's words is set iff node j is i or one of its ancestors."""
        from .trees import tree_layout

        return tree_layout(self).ancestor_bits


class TreeLayout(NamedTuple):
    """Where the nodes of trees stand; one serves all layers of a forward."""

    depths: Tensor  # [N] int32, edges between each node and its root
    ancestor_bits: Tensor  # [N, ceil(max_nodes/64)] int64: bit j of row i's words is set iff node j is i or above it
    positions: Tensor  # [N] int32, depth behind the request's prefix


class SharedPrefix(NamedTuple):
    """Requests that continue one prefix, which is then read once.

    The first `lens[b]` slots of request b are read where request `groups[b]` has them; its own cache row or blocks may
    hold anything there. Several requests share if they name the same one, which may be one of them.
    """

    groups: Tensor  # [B] int32, index of the request whose slots are read
    lens: Tensor  # [B] int32, how many of them; at most prefix_lens[b], and 0 shares nothing


class SamplingParams(NamedTuple):
    """How logits become the distribution that is sampled.

    Each is a number for all requests or a [B] tensor; None is off. Order: allowed -> temperature -> top_k -> top_p
    (on what top_k left) -> min_p. Ties at a threshold stay in, so the kept set depends on values only.
    """

    temperature: float | Tensor = 1.0  # 0 = greedy
    top_k: int | Tensor | None = None  # keep the k largest; 0 = off
    top_p: float | Tensor | None = None  # keep the smallest set of the largest with mass >= top_p; 1 = off
    min_p: float | Tensor | None = None  # keep probabilities >= min_p * the largest; 0 = off
    allowed: Tensor | None = None  # [N, ceil(V/32)] int32 bit mask, bit v%32 of word v//32


class Philox(NamedTuple):
    """A counter-based random stream (Philox4x32-10): a draw depends on nothing but these numbers."""

    seed: Tensor  # [B] int64, one per request
    offset: Tensor  # [B] int64, absolute position of the root
    row: Tensor | None = None  # [B] int32, tells rows of one request apart where an op has several (default 0)


class Lossy(NamedTuple):
    """Hooks of verification that CHANGE the target's output law. Each is off by default.

    Without them every method but `typical` is exact; with any of them none is.

    `judge` (judge decoding, arXiv 2501.19309): a node is accepted if its rule accepts it or the judge does, even if a
    mask or a filter forbids its token. Where one coin decides among siblings (`target_only`, the top tokens of
    `greedy_multi`), the first sibling is taken that the coin or the judge accepts. Not with `block` and `traversal`.

    `reflect_logits` (reflective verification, 2505.18629): the target's logits become, before masks, temperature and
    everything else, (1 - reflect_weight) * target_logits + reflect_weight * reflect_logits. In fp32 (fp64 for fp64
    logits), where each is rounded: the weight, its difference from 1, both products, the sum.

    `synthetic`: for load tests of an engine. Whatever the method, at depth d (the root's is 0) the first child is
    accepted iff its coin is below synthetic[d]; the last token is drawn from p (`greedy`: is its argmax). Draft logits
    are not read, nor rows of nodes on the way unless log-probabilities are asked for.

    `lenience` (the l of Leviathan et al., 2211.17192, appendix A.5, as a factor of q): accept iff u * (l * q) < p, so a
    draft is accepted up to 1/l times as often. Methods `token`, `multi_round`, `without_replacement` and `k_seq`.
    """

    judge: Tensor | None = None  # [N] bool, nodes to accept whatever their rule says; roots are not looked at
    reflect_logits: Tensor | None = None  # [N, V] of the dtype of target_logits
    reflect_weight: float = 0.3  # in [0, 1); without reflect_logits of no effect
    synthetic: float | Tensor | None = None  # rate in [0, 1] at every depth, or [max_depth] fp32 rates
    lenience: float = 1.0  # in (0, 1]; 1 = off


class Verified(NamedTuple):
    """What a verification step commits."""

    tokens: Tensor  # [B, max_depth+1] int32: accepted draft tokens, then exactly one more token, then -1
    nodes: Tensor  # [B, max_depth+1] int32: accepted path, root first, then -1
    num_tokens: Tensor  # [B] int32: accepted + 1; 0 where a row that was read held NaN or nothing finite
    logprobs: Tensor | None = None  # [B, max_depth+1] fp32 under the processed target distribution, on request


class QuantizedHead(NamedTuple):
    """A quantised weight of a head, w = q * scale: what `quantize_head` makes and the head ops take as `weight`.

    Both tensors are plain and contiguous, so they can be saved, moved and sliced by rows like a weight.
    """

    # [V, D] int8 or float8_e4m3fn; or int4 as [V, 64 * G] uint8, G = ceil(D / 128) groups of 128 columns: byte j of a
    # group holds column j in its low four bits and column j + 64 in the high ones, each as q + 8 with q in -8..7.
    values: Tensor
    scales: Tensor  # [V] fp32, of each row; int4: [V, G] fp32, of each group
    dim: int  # D

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[V, D], the weight that this one stands for: products in fp32 (fp64 for fp64), then rounded to `dtype`."""
        from .reference.quantize import dequantize

        exact = torch.float64 if dtype == torch.float64 else torch.float32
        return dequantize(self.values, self.scales, self.dim, dtype=exact).to(dtype)


class HeadTopK(NamedTuple):
    """The largest logits of a drafter head and what is needed to turn them into probabilities."""

    logits: Tensor  # [B, k] fp32, descending, before temperature
    tokens: Tensor  # [B, k] int32 target ids; equal logits by ascending id; -1 where fewer than k are > -inf
    lse: Tensor  # [B] fp32, log-sum-exp of logits / temperature
    entropy: Tensor  # [B] fp32, nats, of softmax(logits / temperature)
    all_logits: Tensor | None  # [B, R] fp32 before temperature, on request


class HeadPart(NamedTuple):
    """What one rank of a sharded head knows of its rows; parts of several ranks merge exactly."""

    keys: Tensor  # [B, k] fp64, what candidates are ranked by: the logit, or logit / temperature + Gumbel noise
    logits: Tensor  # [B, k] fp32, before temperature, by descending key; -inf pads
    tokens: Tensor  # [B, k] int32 target ids, -1 pads
    # [B, 3] fp64: an integer anchor a, then over t = logit * log2(e) / temperature the sums of 2^(t - a) and of
    # 2^(t - a) * (t - a). Sums are NaN where a logit is NaN or +inf; a is -inf where no logit is finite.
    sums: Tensor


class HeadSample(NamedTuple):
    """Draws without replacement from a drafter head, in draw order (the first is a draw of the softmax)."""

    logits: Tensor  # [B, k] fp32 of the drawn tokens, before temperature
    tokens: Tensor  # [B, k] int32 target ids in draw order; -1 where fewer than k tokens have positive probability
    lse: Tensor  # [B] fp32, log-sum-exp of logits / temperature
    entropy: Tensor  # [B] fp32, nats, of softmax(logits / temperature)
    all_logits: Tensor | None  # [B, R] fp32 before temperature, on request
