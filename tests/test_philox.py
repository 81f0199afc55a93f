"""Philox4x32-10: the published vectors, and the C++ header against the Python definition word for word."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from specdec_kernels import philox

INCLUDE = Path(__file__).resolve().parents[1] / "csrc" / "include"

# (counter, key, words) of Random123's kat_vectors for philox4x32 with 10 rounds.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include "specdec/philox.h"

unsigned bits(float value) {
  unsigned r;
  std::memcpy(&r, &value, sizeof r);
  return r;
}

int main(int count, char** words) {
  unsigned long long seed, offset, column;
  unsigned stream, row;
  while (std::scanf("%llu %llu %u %u %llu", &seed, &offset, &stream, &row, &column) == 5) {
    const uint32_t word = specdec::philox_word(seed, offset, static_cast<specdec::Stream>(stream), row, column);
    std::printf("%u %u %u\\n", word, bits(specdec::coin(word)), bits(specdec::gumbel_argument(word)));
  }
  for (int i = 1; i < count; ++i) {
    const uint32_t word = std::strtoul(words[i], nullptr, 10);
    std::printf("%u %u %u\\n", word, bits(specdec::coin(word)), bits(specdec::gumbel_argument(word)));
  }
}
"""


# Where fp32 starts to round, half way between two values, and what would round to 1.
EXTREME_WORDS = [0, 1, 2**23 + 1, 2**24 - 1, 2**24 + 1, 2**24 + 3, 2**31 + 128, 2**31 + 384, 2**32 - 129, 2**32 - 1]


def signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected, device):
    seed = torch.tensor(signed(key[1] << 32 | key[0]), device=device)
    words = philox.philox(seed, *(torch.tensor(c, device=device) for c in counter))
    assert tuple(w.item() for w in words) == expected


def test_columns_share_a_counter_in_fours():
    seed, offset, row = torch.tensor(7), torch.tensor(9), torch.tensor(2)
    columns = philox.words(seed, offset, philox.DRAFT, row, torch.arange(8))
    for quarter in range(2):
        four = philox.philox(seed, offset, torch.tensor(philox.DRAFT), row, torch.tensor(quarter))
        assert columns[4 * quarter : 4 * quarter + 4].tolist() == [w.item() for w in four]


def test_extreme_words_give_finite_noise(monkeypatch):
    monkeypatch.setattr(philox, "words", lambda *args: torch.tensor([0, 2**32 - 1]))
    zero = torch.zeros((), dtype=torch.int64)
    coins = philox.coins(zero, zero, philox.ACCEPT, zero)
    assert coins[0] == 0 and coins[1] < 1
    noise = philox.gumbels(zero, zero, zero, zero)
    torch.testing.assert_close(noise.tolist(), [33 * math.log(2), -math.log(24 * math.log(2))], rtol=1e-6, atol=0)


def test_noise_tells_small_words_apart(monkeypatch, device):
    """The largest noise comes from the smallest words: each has a value of its own, right to the last bits of fp32."""
    words = torch.cat([torch.arange(5000), 2 ** torch.arange(13, 32)])
    monkeypatch.setattr(philox, "words", lambda *args: words.to(device))
    zero = torch.zeros((), dtype=torch.int64, device=device)
    noise = philox.gumbels(zero, zero, zero, zero).cpu()
    exact = -torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))
    torch.testing.assert_close(noise.double(), exact, rtol=3e-7, atol=3e-7)
    assert (noise.diff() < 0).all()


def test_header_equals_definition(tmp_path):
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]!r} is not on PATH")
    source, program = tmp_path / "words.cpp", tmp_path / "words"
    source.write_text(PROGRAM)
    subprocess.run([*compiler, "-std=c++17", f"-I{INCLUDE}", str(source), "-o", str(program)], check=True)
    generator = torch.Generator().manual_seed(0)
    seed, offset = torch.randint(-(2**63), 2**63 - 1, (2, 500), generator=generator)
    stream, row = torch.arange(500) % 4, torch.randint(0, 2**31 - 1, (500,), generator=generator)
    column = torch.randint(0, 2**34, (500,), generator=generator)
    counters = torch.stack([seed, offset, stream, row, column], 1).tolist()
    text = "\n".join(f"{s % 2**64} {o % 2**64} {c} {r} {v}" for s, o, c, r, v in counters)
    extremes = [str(word) for word in EXTREME_WORDS]
    run = subprocess.run([str(program), *extremes], input=text, capture_output=True, text=True, check=True)
    got = torch.tensor([[int(number) for number in line.split()] for line in run.stdout.splitlines()])
    words = torch.cat([philox.words(seed, offset, stream, row, column), torch.tensor(EXTREME_WORDS)])
    assert torch.equal(got[:, 0], words)
    coins = (words >> 8).to(torch.float32) * 2.0**-24
    assert torch.equal(got[:, 1], coins.view(torch.int32).long())
    arguments = philox.gumbel_argument(words)
    assert torch.equal(got[:, 2], arguments.view(torch.int32).long())
    assert arguments.max() < 1 and arguments.min() == 2.0**-33
