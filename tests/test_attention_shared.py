"""Requests on one prefix, and layouts that the caller made."""

from __future__ import annotations

import pytest
import torch

from attention_cases import NAN, Case
from specdec_kernels import SharedPrefix, TreeLayout, trees


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
