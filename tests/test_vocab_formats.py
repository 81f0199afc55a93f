"""Token maps of other engines: read, written, and refused where another engine would draft the wrong tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from specdec_loop.vocab import read_eagle3, read_token_map, write_eagle3, write_token_map

V = 100
# Neighbours, so that the offsets repeat; the last stands high, so that as offsets the ids would pass V.
ROWS = torch.tensor([0, 1, 7, 8, 9, 40, 99], dtype=torch.int32)
D2T = torch.tensor([0, 0, 5, 5, 5, 35, 93])
T2D = torch.zeros(V, dtype=torch.bool).index_fill(0, ROWS.long(), True)
# Offsets of 1, 3, 5, 7, and as well four ids.
BOTH = torch.tensor([1, 2, 3, 4])


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "bin"])
def test_eagle3_comes_back(tmp_path, suffix):
    path = tmp_path / "new" / f"head.{suffix}"
    write_eagle3(path, ROWS, V)
    tensors = load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
    assert tensors["d2t"].tolist() == D2T.tolist() and tensors["d2t"].dtype == torch.int64
    assert torch.equal(tensors["t2d"], T2D)
    found = read_eagle3(path, V, draft_vocab_size=7)
    assert torch.equal(found, ROWS) and found.dtype == torch.int32


def test_eagle3_as_the_training_script_writes_it():
    """d2t[i] = used[i] - i, t2d[i] = whether i is used, inside a draft model's state dict."""
    used = [3, 4, 5, 60, 61, 98]
    d2t = torch.tensor([used[i] - i for i in range(len(used))])
    t2d = torch.tensor([i in used for i in range(V)])
    checkpoint = {"model.d2t": d2t, "model.t2d": t2d, "model.fc.weight": torch.zeros(2, 2)}
    assert read_eagle3(checkpoint, V).tolist() == used
    assert read_eagle3({"d2t": d2t}, V).tolist() == used


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 59), min_size=1), st.booleans())
def test_eagle3_never_reads_other_ids(ids, with_t2d):
    """Whatever the rows: the right ids, or without t2d a refusal; never others."""
    rows = torch.tensor(sorted(ids))
    tensors = {"d2t": rows - torch.arange(len(rows))}
    if with_t2d:
        tensors["t2d"] = torch.zeros(60, dtype=torch.bool).index_fill(0, rows, True)
    try:
        found = read_eagle3(tensors, 60)
    except ValueError as error:
        assert not with_t2d and "can be both" in str(error)
        found = read_eagle3(tensors, 60, kind="offsets")
    assert found.tolist() == rows.tolist()


def test_eagle3_t2d_says_what_d2t_is():
    for ids in ([1, 3, 5, 7], [1, 2, 3, 4]):
        t2d = torch.zeros(V, dtype=torch.bool).index_fill(0, torch.tensor(ids), True)
        assert read_eagle3({"d2t": BOTH, "t2d": t2d}, V).tolist() == ids


def test_eagle3_that_can_be_both_is_refused_unless_told():
    with pytest.raises(
        ValueError, match=r"^kind: expected 'ids' or 'offsets', got None; the 4 numbers of d2t can be both"
    ):
        read_eagle3({"d2t": BOTH}, V)
    assert read_eagle3({"d2t": BOTH}, V, kind="offsets").tolist() == [1, 3, 5, 7]
    assert read_eagle3({"d2t": BOTH}, V, kind="ids").tolist() == [1, 2, 3, 4]
    # Both readings of one row are the same.
    assert read_eagle3({"d2t": torch.tensor([5])}, V).tolist() == [5]


def test_eagle3_of_absolute_ids():
    message = r"^i \+ d2t\[i\]: expected ids in 0\.\.99, got 105; the numbers can be ids, which kind='ids' reads"
    with pytest.raises(ValueError, match=message):
        read_eagle3({"d2t": ROWS}, V)
    assert torch.equal(read_eagle3({"d2t": ROWS}, V, kind="ids"), ROWS)
    assert torch.equal(read_eagle3({"d2t": ROWS, "t2d": T2D}, V), ROWS)
    with pytest.raises(
        ValueError, match=r"^d2t: expected each id once, .* the numbers can be offsets, which kind='offsets'"
    ):
        read_eagle3({"d2t": D2T}, V, kind="ids")


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        ({"t2d": T2D}, {}, ValueError, r"^d2t: expected a tensor of this name, got \['t2d'\]; without it row i"),
        ({"a.d2t": D2T, "b.d2t": D2T}, {}, ValueError, r"^d2t: expected one tensor .*, got \['a.d2t', 'b.d2t'\]"),
        ({"d2t": D2T[None]}, {}, TypeError, r"^d2t: expected a tensor of one dimension, got Tensor \[1, 7\]"),
        ({"d2t": D2T.float()}, {}, TypeError, "^d2t: expected integer ids, got float32"),
        ({"d2t": D2T > 0}, {}, TypeError, "^d2t: expected integer ids, got bool"),
        ({"d2t": D2T}, {"draft_vocab_size": 8}, ValueError, r"^d2t: expected one entry for each of 8 rows, got \[7\]"),
        ({"d2t": D2T + 1}, {}, ValueError, r"^i \+ d2t\[i\]: expected ids in 0\.\.99, got 100"),
        ({"d2t": D2T.flip(0)}, {}, ValueError, r"^i \+ d2t\[i\]: expected "),
        ({"d2t": D2T}, {"kind": "offset"}, ValueError, "^kind: expected one of None, 'ids', 'offsets', got 'offset'"),
        ({"d2t": D2T, "t2d": T2D[:-1]}, {}, ValueError, r"^t2d: expected shape \[100\] and dtype bool, got \[99\]"),
        ({"d2t": D2T, "t2d": T2D.int()}, {}, ValueError, r"^t2d: expected shape \[100\] and dtype bool, got .* int32"),
        ({"d2t": D2T, "t2d": ~T2D}, {}, ValueError,
         "^d2t: expected the 93 ids that t2d marks, got 7, of which 7 are not marked; the two contradict"),
        ({"d2t": D2T, "t2d": T2D | (torch.arange(V) == 50)}, {}, ValueError,
         "^d2t: expected the 8 ids that t2d marks, got 7, of which 0 are not marked"),
    ],
)  # fmt: skip
def test_eagle3_that_does_not_fit(tensors, options, error, message):
    with pytest.raises(error, match=message):
        read_eagle3(tensors, V, **options)


def test_token_map_comes_back(tmp_path):
    path = tmp_path / "new" / "hot.pt"
    write_token_map(path, ROWS, V)
    assert torch.load(path, weights_only=True) == ROWS.tolist()
    assert torch.equal(read_token_map(path, V), ROWS)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_token_map_by_frequency(tmp_path, as_tensor):
    ids = [40, 0, 99, 7, 1]
    torch.save(torch.tensor(ids) if as_tensor else ids, tmp_path / "freq.pt")
    assert read_token_map(tmp_path / "freq.pt", V).tolist() == sorted(ids)
    save_file({"ids": torch.tensor(ids)}, tmp_path / "freq.safetensors")
    assert read_token_map(tmp_path / "freq.safetensors", V).tolist() == sorted(ids)


def test_token_map_with_a_doubled_end_of_text(tmp_path):
    torch.save([40, 0, 99, 7, 1, 99], tmp_path / "freq.pt")
    with pytest.raises(
        ValueError, match=r"freq.pt: expected each id once, got 1 ids several times, the first 99 at \[2, 5\]"
    ):
        read_token_map(tmp_path / "freq.pt", V)
    assert read_token_map(tmp_path / "freq.pt", V, drop_repeated=True).tolist() == [0, 1, 7, 40, 99]
    # Sorted and low, such a list has the look of offsets; it must not be read as that.
    torch.save([1, 2, 2, 9], tmp_path / "low.pt")
    with pytest.raises(ValueError, match=r"expected each id once, .* the numbers can be offsets"):
        read_token_map(tmp_path / "low.pt", V)
    with pytest.raises(
        ValueError, match=r"^kind: expected 'ids' beside drop_repeated, got None; .* can be offsets too"
    ):
        read_token_map(tmp_path / "low.pt", V, drop_repeated=True)
    assert read_token_map(tmp_path / "low.pt", V, kind="ids", drop_repeated=True).tolist() == [1, 2, 9]


def test_token_map_of_offsets(tmp_path):
    torch.save(D2T, tmp_path / "d2t.pt")
    with pytest.raises(
        ValueError, match=r"expected each id once, .* the numbers can be offsets, which kind='offsets' reads"
    ):
        read_token_map(tmp_path / "d2t.pt", V)
    assert torch.equal(read_token_map(tmp_path / "d2t.pt", V, kind="offsets"), ROWS)
    torch.save(BOTH, tmp_path / "both.pt")
    with pytest.raises(
        ValueError, match=r"^kind: expected 'ids' or 'offsets', got None; the 4 numbers of .* can be both"
    ):
        read_token_map(tmp_path / "both.pt", V)
    assert read_token_map(tmp_path / "both.pt", V, kind="ids").tolist() == [1, 2, 3, 4]


class Touch:
    """What a pickle may do when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_token_map_that_runs_code_is_not_run(tmp_path):
    torch.save([Touch(tmp_path / "was here")], tmp_path / "freq.pt")
    with pytest.raises(ValueError, match="expected tensors or a list of ids that load without running code, got "):
        read_token_map(tmp_path / "freq.pt", V)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([3, V], ValueError, r"expected ids in 0\.\.99, got 100"),
        ([-1, 3], ValueError, r"expected ids in 0\.\.99, got -1"),
        ([], ValueError, r"expected shape \[R\] with R >= 1, got \[0\]"),
        ([1.0, 2.0], TypeError, "expected a list or a tensor of ids, got list"),
        ([True, False], TypeError, "expected a list or a tensor of ids, got list"),
        ("ids", TypeError, "expected a list or a tensor of ids, got str"),
        ({"d2t": D2T, "t2d": T2D}, ValueError, r"expected a list of ids, got \['d2t', 't2d'\]; see read_eagle3"),
        (np.arange(3), ValueError, "load without running code"),
        (torch.ones(2, 2).long(), ValueError, r"expected shape \[R\] with R >= 1, got \[2, 2\]"),
    ],
)
def test_token_map_that_does_not_fit(tmp_path, content, error, message):
    torch.save(content, tmp_path / "map.pt")
    with pytest.raises(error, match=message):
        read_token_map(tmp_path / "map.pt", V)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a token map, got no such file"):
        read_token_map(tmp_path / "nothing.pt", V)
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("no tensors at all")
        with pytest.raises(ValueError, match="expected tensors or a list of ids that load without running code, got "):
            read_eagle3(tmp_path / name, V)


@pytest.mark.parametrize("write", [write_eagle3, write_token_map])
def test_only_rows_of_a_head_are_written(tmp_path, write):
    for rows in (torch.tensor([3, 1]), torch.tensor([1, 1]), torch.tensor([1, V])):
        with pytest.raises(ValueError, match=r"^rows: expected "):
            write(tmp_path / "map.pt", rows, V)
    assert not (tmp_path / "map.pt").exists()
