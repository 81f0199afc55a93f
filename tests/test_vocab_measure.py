"""What is measured for the choice of a size: heads, steps of the loop, acceptance."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import specdec_kernels as sk
from loop_support import llama, noisy, one_thread  # noqa: F401 (a fixture)
from specdec_loop.vocab import (
    Costs,
    Latency,
    frequency_order,
    loop_steps,
    measure_acceptance,
    measure_costs,
    measure_head,
    select_rows,
    steps,
    time_calls,
)
from specdec_loop.vocab import latency as latency_module


class TestLatency:
    def test_is_the_lower_bound_of_what_was_measured(self):
        samples = torch.tensor([[3.0, 9.0, 5.0, 7.0], [2.0, 6.0, 8.0, 9.0]])
        found = Latency.of_samples([1, 2, 4, 8], samples)
        # The second size was disturbed in both rounds: a larger one took less.
        assert found.seconds.tolist() == [2, 5, 5, 7] and found.seconds.dtype == torch.float64

    def test_is_linear_in_between(self):
        found = Latency(torch.tensor([10, 20, 40]), torch.tensor([1.0, 2.0, 8.0], dtype=torch.float64))
        assert found.at([10, 15, 20, 30, 40]).tolist() == [1.0, 1.5, 2.0, 5.0, 8.0]
        for sizes in ([9, 20], [20, 41]):
            with pytest.raises(ValueError, match=r"^sizes: expected 10\.\.40, as measured, got "):
                found.at(sizes)

    @pytest.mark.parametrize(
        ("sizes", "samples", "message"),
        [
            ([2, 1], torch.ones(3, 2), r"^sizes: expected ascending sizes, each once, got \[2, 1\]"),
            ([1, 1], torch.ones(3, 2), r"^sizes: expected ascending sizes, each once, got \[1, 1\]"),
            ([1, 2], torch.ones(3, 3), r"^samples: expected shape \[rounds, 2\], got \[3, 3\]"),
            ([1, 2], torch.ones(0, 2), r"^samples: expected shape \[rounds, 2\], got \[0, 2\]"),
            ([1, 2], torch.zeros(1, 2), r"^samples: expected finite seconds > 0, got 0\.0\.\.0\.0"),
            ([1, 2], torch.full((1, 2), torch.nan), r"^samples: expected finite seconds > 0, got nan"),
        ],
    )
    def test_samples_that_do_not_fit(self, sizes, samples, message):
        with pytest.raises(ValueError, match=message):
            Latency.of_samples(sizes, samples)


class TestTiming:
    @pytest.fixture
    def clock(self, monkeypatch):
        """A clock that stands still but for what is added to it."""
        now = [0.0]
        monkeypatch.setattr(latency_module.time, "perf_counter", lambda: now[0])
        return now

    def test_calls_run_in_turn_and_only_they_are_timed(self, clock):
        seen = []

        def call(name, seconds):
            def run():
                seen.append(name)
                clock[0] += seconds

            return run

        calls = [call("a", 2.0), call("b", 0.5)]
        samples = time_calls(calls, between=call("-", 10.0), rounds=4, seconds=1e9)
        assert seen == ["a", "-", "a", "b", "-", "b"] * 4
        assert samples.tolist() == [[2.0, 0.5]] * 4 and samples.dtype == torch.float64

    @pytest.mark.parametrize(("seconds", "expected"), [(0.0, 3), (7.0, 8), (1e9, 50)])
    def test_time_ends_it_but_for_three_rounds(self, clock, seconds, expected):
        def call():
            clock[0] += 0.5

        assert time_calls([call], rounds=50, seconds=seconds).shape == (expected, 1)

    def test_progress_is_shown(self):
        shown = io.StringIO()
        time_calls([lambda: None], rounds=3, label="calls", console=Console(file=shown))
        assert "calls" in shown.getvalue()

    def test_too_few_rounds(self):
        with pytest.raises(ValueError, match=r"^rounds: expected >= 3, got 2"):
            time_calls([lambda: None], rounds=2)


class TestHead:
    WEIGHT = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ORDER = frequency_order(torch.arange(64) * 37 % 64)

    @pytest.mark.parametrize(("temperature", "op"), [(0.0, "head_topk"), (0.7, "head_sample")])
    def test_times_the_op_on_rows_of_the_weight_itself(self, monkeypatch, temperature, op):
        seen, real, between = [], getattr(sk, op), []

        def spy(hidden, weight, k, **options):
            seen.append((hidden, weight, k, options))
            return real(hidden, weight, k, **options)

        monkeypatch.setattr(latency_module, op, spy)
        bias = torch.zeros(64)
        found = measure_head(
            self.WEIGHT, self.ORDER, [4, 32, 64], bias=bias, batch=3, temperature=temperature,
            between=lambda: between.append(1), rounds=3,
        )  # fmt: skip
        assert found.sizes.tolist() == [4, 32, 64] and bool((found.seconds > 0).all())
        assert len(seen) == 18 and len(between) == 9
        for number, (hidden, weight, k, options) in enumerate(seen):
            assert hidden.shape == (3, 16) and hidden.dtype == torch.bfloat16 and k == 1
            assert weight is self.WEIGHT and options["bias"] is bias
            expected = (4, 32, None)[number // 2 % 3]
            if expected is None:
                assert options["rows"] is None
            else:
                assert torch.equal(options["rows"], select_rows(self.ORDER, expected))
            assert options.get("return_logits", False) == (temperature > 0)

    def test_a_larger_head_takes_longer(self):
        weight = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0))
        found = measure_head(weight, torch.arange(20000), [64, 20000], rounds=5)
        assert float(found.seconds[1]) > 2 * float(found.seconds[0])


@pytest.fixture(scope="module")
def models():
    target = llama(0, layers=3)
    return target, noisy(target, 0.05)


class TestSteps:
    PROMPT = torch.arange(1, 9)

    def test_what_runs_in_a_step(self, models, monkeypatch):
        target, drafter = models
        seen = []
        real = steps.attend.forward
        monkeypatch.setattr(
            steps.attend, "forward", lambda model, cache, tokens, positions, step: seen.append(
                (model, tokens.shape[0], positions.tolist())
            ) or real(model, cache, tokens, positions, step)
        )  # fmt: skip
        monkeypatch.setattr(steps.attend, "prefill", lambda *args, **options: None)
        with loop_steps(target, drafter, self.PROMPT, draft_length=3, batch=2) as found:
            for call in found[:3]:
                call()
        assert seen == [
            (target, 8, [7, 8, 9, 10] * 2),
            (drafter.base_model, 2, [7, 7]),
            (target, 2, [7, 7]),
        ]
        assert found.shares == (1.0, 1.0, 1.0)

    def test_a_drafter_of_one_layer_takes_its_share(self, models, monkeypatch):
        monkeypatch.setattr(
            steps, "time_calls", lambda calls, **_: torch.tensor([[5.0, 9.0, 4.0], [6.0, 3.0, 8.0], [7.0, 6.0, 2.0]])
        )
        for drafter, body in ((None, 1.0), (models[1], 3.0)):
            with loop_steps(models[0], drafter, self.PROMPT, draft_length=2) as found:
                assert measure_costs(found) == Costs(target=5.0, body=body, plain=2.0)

    def test_attention_is_put_back(self, models):
        before = models[0].config._attn_implementation
        with loop_steps(*models, self.PROMPT, draft_length=2) as found:
            costs = measure_costs(found, rounds=3)
        assert models[0].config._attn_implementation == models[1].config._attn_implementation == before
        assert all(seconds > 0 for seconds in costs)


class TestAcceptance:
    PROMPTS = (torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6, 7, 8, 9]))

    def test_of_the_target_itself_is_one(self):
        target = llama(0)
        acceptance, statistics = measure_acceptance(target, target, self.PROMPTS, draft_length=3, max_new_tokens=12)
        assert acceptance == 1.0 and statistics.tokens == 36 and statistics.request_rounds == 9

    def test_explains_the_block_efficiency(self):
        target = llama(0)
        options = {"draft_length": 3, "max_new_tokens": 20}
        acceptance, statistics = measure_acceptance(target, noisy(target, 0.05), self.PROMPTS, batch=2, **options)
        assert 0 < acceptance < 1
        assert sum(acceptance**j for j in range(4)) == pytest.approx(statistics.block_efficiency)
        assert statistics.tokens == 60
