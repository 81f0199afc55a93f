"""The benchmarks: what they call plain torch at its best commits the ops' tokens, and `make gpu` runs its steps."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specdec_kernels import SamplingParams
from specdec_kernels.trees import branching_tree, sequoia_tree

BENCH = Path(__file__).resolve().parents[1] / "bench"
SHAPES = {"wide": branching_tree([4, 2]), "uneven": sequoia_tree([0.6, 0.2, 0.1], 17, 5)[0]}


@pytest.fixture(scope="module")
def gpu():
    """The GPU benchmarks, whose baselines run anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import bench_gpu

        yield bench_gpu


@pytest.fixture(scope="module")
def trees():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import bench_verify_trees

        yield bench_verify_trees


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=12, top_p=0.9)], ids=["all", "filtered"])
@pytest.mark.parametrize("method", ["multi_round", "without_replacement", "target_only", "greedy"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 6])
def test_baselines_of_trees(trees, batch, shape, method, params):
    accepted = set()
    for seed in range(8 if batch == 1 else 2):
        case = trees.problem(method, SHAPES[shape], batch, 300, torch.bfloat16, params, seed=seed)
        expected = case.op(method, "reference")()
        found = trees.baselines(case, method)
        assert found
        for name, other in found.items():
            assert torch.equal(other(), expected.tokens.long()), name
        accepted |= set(expected.num_tokens.tolist())
    assert len(accepted) > 1


def test_the_rows_a_walk_reads_are_counted(trees):
    """Greedy: the target's row of every node on the path, and nothing else; the logits are as they were."""
    case = trees.problem("greedy", SHAPES["wide"], 3, 50, torch.float32)
    before = case.target.clone(), case.draft.clone()
    path = int(case.op("greedy")().num_tokens.sum())
    assert case.bytes_read("greedy") == path * 50 * 4
    assert torch.equal(case.target, before[0]) and torch.equal(case.draft, before[1])
    case = trees.problem("multi_round", SHAPES["wide"], 3, 50, torch.bfloat16)
    nodes = case.op("multi_round")().nodes
    drafted = int(((nodes >= 0) & (nodes < case.used)).sum())
    assert case.bytes_read("multi_round") == (int((nodes >= 0).sum()) + drafted) * 50 * 2


@pytest.mark.parametrize("method", ["multi_round", "without_replacement"])
@pytest.mark.parametrize("shape", SHAPES)
def test_baselines_for_a_gpu(gpu, shape, method):
    for seed in range(4):
        case = gpu.problem(method, SHAPES[shape], 3, 300, torch.bfloat16, seed=seed)
        found = case.op(method, "reference")()
        walk = functools.partial(gpu.careful_gpu.tree, children=case.children(), replacement=method == "multi_round")
        assert torch.equal(walk(case), found.tokens.long())
    assert gpu.bytes_of_rows(case, found.nodes) == case.bytes_read(method)


def test_baselines_of_chains_for_a_gpu(gpu):
    for seed in range(4):
        case = gpu.problem("multi_round", gpu.CHAIN, 6, 300, torch.bfloat16, seed=seed)
        found = gpu.chain_op(case, "reference")()
        assert torch.equal(gpu.careful_gpu.chain(case), found.tokens.long())


@pytest.mark.full
def test_baselines_for_a_gpu_compile_to_one_graph(gpu):
    case = gpu.problem("without_replacement", SHAPES["wide"], 2, 300, torch.bfloat16)
    walk = functools.partial(gpu.careful_gpu.tree, children=case.children(), replacement=False)
    chains = gpu.problem("multi_round", gpu.CHAIN, 2, 300, torch.bfloat16)
    for function, each in ((walk, case), (gpu.careful_gpu.chain, chains)):
        compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="eager")
        assert torch.equal(compiled(each), function(each))


def test_vllm_is_called_as_its_sampler_is_declared(gpu):
    """Both signatures that it has had: probabilities, then logits of the target."""

    def check(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, rows, bonus, metadata):
        assert draft_token_ids.tolist() == case.tokens[:, 1:].flatten().tolist()
        assert (num_draft_tokens, max_spec_len, cu_num_draft_tokens.tolist()) == ([4, 4, 4], 4, [4, 8, 12])
        assert draft_probs.shape == rows.shape == (12, 50) and bonus.shape == (3, 1) and metadata.all_random
        assert draft_probs.is_contiguous() and rows.is_contiguous()
        assert torch.allclose(draft_probs.sum(1), torch.ones(12))
        return rows

    def earlier(a, b, c, d, draft_probs, target_probs, e, f):
        return check(a, b, c, d, draft_probs, target_probs, e, f)

    def later(a, b, c, d, draft_probs, target_logits, e, f):
        return check(a, b, c, d, draft_probs, target_logits, e, f)

    case = gpu.problem("multi_round", gpu.CHAIN, 3, 50, torch.float32)
    logits = case.target.view(3, 5, 50)[:, :-1].reshape(12, 50)
    found = [gpu.vllm_chain(SimpleNamespace(rejection_sample=f), case) for f in (earlier, later)]
    assert torch.equal(found[0], logits.softmax(-1)) and torch.equal(found[1], logits)


def test_steps_whose_tool_is_missing_are_named_and_others_run(gpu, tmp_path, monkeypatch):
    import gpu as script

    monkeypatch.setattr(script.shutil, "which", lambda tool: None)
    assert [name for name, command in script.steps(tmp_path).items() if command is None] == ["memcheck", "racecheck"]
    assert script.run("memcheck", None, tmp_path, {})["status"] == "missing"
    monkeypatch.setattr(script.shutil, "which", lambda tool: f"/opt/{tool}")
    found = script.steps(tmp_path)
    assert found["racecheck"][:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert all((script.ROOT / test).exists() for test in script.SANITIZED[2:])
    printing = "import os; print(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING']); raise SystemExit(3)"
    step = script.run("memcheck", [sys.executable, "-c", printing], tmp_path, dict(os.environ))
    assert step["status"] == 3 and (tmp_path / "memcheck.log").read_text() == "1\n"
