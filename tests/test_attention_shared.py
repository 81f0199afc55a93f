"""Requests on one prefix, and layouts that the caller made."""

from __future__ import annotations

import pytest
import torch

from attention_cases import NAN, Case
from specdec_kernels import SharedPrefix, TreeLayout, attention, trees


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def family(lens, groups, **options):
    """A case of four requests whose slots below lens[b] are those of groups[b], and the sharing that says so."""
    case = Case([[-1, 0, 0, 1], [-1, 0], [-1], [-1, 0, 1, 2, 0]], [9, 6, 11, 12], **options)
    for b, (group, length) in enumerate(zip(groups, lens, strict=True)):
        for cache in (case.keys, case.values):
            cache[b, :, :length] = cache[group, :, :length]
    return case, SharedPrefix(ints(*groups), ints(*lens))


CASES = [
    ([5, 5, 5, 5], [0, 0, 0, 0]),
    ([9, 6, 0, 3], [0, 0, 2, 0]),
    ([0, 6, 4, 4], [1, 0, 3, 3]),
    ([4, 6, 4, 12], [2, 1, 2, 3]),
]


@pytest.mark.parametrize(("lens", "groups"), CASES)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("block_size", [None, 4])
def test_a_shared_prefix_is_read_where_its_owner_has_it(lens, groups, window, block_size, device):
    case, shared = family(lens, groups)
    want = case.run(window=window, return_lse=True)
    for b, (group, length) in enumerate(zip(groups, lens, strict=True)):
        if group != b:
            for cache in (case.keys, case.values):
                cache[b, :, :length] = NAN
    caches = {} if block_size is None else case.paged(block_size)
    if block_size is not None:
        caches = {name: value.to(device) for name, value in caches.items()}
    shared = SharedPrefix(*(value.to(device) for value in shared))
    got = case.run(device, window=window, return_lse=True, shared=shared, **caches)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-5, rtol=1e-5)


def test_sharing_that_does_not_fit_stays_in_bounds(device):
    """Lengths are cut to the prefix, a request that is not there is the request itself."""
    case, _ = family([0, 0, 0, 0], [0, 1, 2, 3])
    shared = SharedPrefix(ints(-5, 99, 2, 3).to(device), ints(99, 7, -4, 99).to(device))
    torch.testing.assert_close(case.run(device, shared=shared).cpu(), case.run(), atol=1e-5, rtol=1e-5)


def test_a_layout_is_used_as_it_is(device):
    case = Case([[-1, 0, 0, 1], [-1, 0]], [9, 6])
    layout = trees.tree_layout(case.tree)
    on_device = TreeLayout(*(value.to(device) for value in layout))
    torch.testing.assert_close(case.run(device, layout=on_device, window=3).cpu(), case.run(window=3))
    # All nodes at the root's position: a window of 3 then reaches two committed slots from each of them.
    flat = TreeLayout(torch.zeros_like(on_device.depths), *on_device[1:])
    got = case.run(device, layout=flat, window=3, mask_bits=on_device.ancestor_bits).cpu()
    keys = torch.cat([case.keys[0, :, 7:9], case.keys[0, :, [9, 10, 12]]], 1)
    values = torch.cat([case.values[0, :, 7:9], case.values[0, :, [9, 10, 12]]], 1)
    q = case.query[3].view(2, 2, 8)
    weights = (q @ keys.transpose(1, 2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(got[3].view(2, 2, 8), weights @ values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 6, 2**63 - 1])
@pytest.mark.parametrize("depths", [[6, 7, 7, 8, 6, 7], [-6, 1, 1, 2, 0, 1], [-2, -1, -1, 0, -100, 3]])
def test_depths_of_any_size(depths, window, device):
    """A node's position need not be behind the prefix: windows go by positions wherever these are."""
    case = Case([[-1, 0, 0, 1], [-1, 0]], [9, 6])
    layout = trees.tree_layout(case.tree)._replace(depths=ints(*depths))
    want = case.run(layout=layout, window=window, return_lse=True, backend="reference")
    layout = TreeLayout(*(value.to(device) for value in layout))
    for a, b in zip(case.run(device, layout=layout, window=window, return_lse=True), want, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-5, rtol=1e-5)


def test_extreme_scales_sinks_and_caps(device):
    case = Case([[-1, 0, 0, 1], [-1, 0]], [9, 6])
    for options in (
        {"sinks": torch.full((4,), 1e10)},
        {"sinks": torch.tensor([3e9, -3e9, 0.0, 1e30])},
        {"softcap": 1e-30},
        {"k_scale": torch.tensor([1.0, NAN])},
    ):
        want = case.run(**options, backend="reference")
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()
        }
        torch.testing.assert_close(case.run(device, **moved).cpu(), want, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_debug_checks_look_at_the_owners_blocks(monkeypatch):
    case, shared = family([5, 5, 5, 5], [0, 0, 0, 0])
    caches = case.paged(4)
    table = caches["block_table"]
    table[1:, 0] = -1  # slots 0..3 are all shared: a member's own table may say anything there
    monkeypatch.setattr(attention, "DEBUG", True)
    case.run(shared=shared, **caches)
    with pytest.raises(ValueError, match=r"block_table: expected blocks in 0\.\."):
        case.run(**caches)
    table[1:, 0], table[0, 0] = table[0, 0].clone(), -1
    with pytest.raises(ValueError, match=r"block_table: expected blocks in 0\.\.\d+ of the owner"):
        case.run(shared=shared, **caches)
    with pytest.raises(ValueError, match="prefix_lens: expected prefix and tree within"):
        Case([[-1], [-1]], [9, 3]).run(prefix_lens=ints(2**31 - 1, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": (1, 2)}, TypeError, "layout: expected a TreeLayout, got tuple"),
        ({"layout": TreeLayout(ints(0), ints(0), ints(0))}, ValueError, "layout.depths: expected shape"),
        ({"shared": ints(0, 0)}, TypeError, "shared: expected a SharedPrefix, got Tensor"),
        ({"shared": SharedPrefix(ints(0), ints(1))}, ValueError, "shared.groups: expected shape"),
        ({"shared": SharedPrefix(ints(0, 0), ints(1, 1).long())}, TypeError, "shared.lens: expected dtype int32"),
    ],
)
def test_bad_sharing_and_layouts_are_named(change, error, message):
    with pytest.raises(error, match=message):
        Case([[-1, 0], [-1]], [4, 5]).run(**change)
