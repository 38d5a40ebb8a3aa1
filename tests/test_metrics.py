"""Metrics against independent references, and over two processes."""

from __future__ import annotations

import math

import pytest
import torch

from iqstar.metrics import TokenMeans, distinct_n
from processes import two_processes


def test_distinct_n_by_hand():
    # a b a b -> ab ba ab; B c -> bc: 3 distinct of 4.
    assert distinct_n(["a b a b", "B c"], 2) == 3 / 4
    # a b a b B c -> a, b, c of 6.
    assert distinct_n(["a b a b", "B c"], 1) == 3 / 6
    # The same as token ids.
    assert distinct_n([[1, 2, 1, 2], [2, 3]], 2) == 3 / 4


def test_distinct_n_against_reference():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(4, (int(k),), generator=generator).tolist() for k in range(12)]
    for n in (1, 2, 3):
        seen, total = set(), 0
        for row in rows:
            for i in range(len(row)):
                if i + n <= len(row):
                    seen.add("-".join(map(str, row[i : i + n])))
                    total += 1
        assert distinct_n(rows, n) == len(seen) / total


def test_distinct_n_edges():
    assert math.isnan(distinct_n([], 2))
    assert math.isnan(distinct_n(["", "one"], 2))
    with pytest.raises(ValueError, match="at least 1"):
        distinct_n(["a"], 0)


def pair(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return values.sum(), torch.tensor(values.numel())


def test_token_means_are_global_means():
    chunks = [torch.randn(k, requires_grad=True) for k in (1, 50, 3)]
    metric = TokenMeans(["kl"])
    for chunk in chunks:
        metric.update({"kl": pair(chunk), "loss/a.b": pair(2 * chunk)})
    expected = torch.cat(chunks).double().mean()
    result = metric.compute()
    torch.testing.assert_close(result["kl"], expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result["loss/a.b"], 2 * expected.detach(), rtol=1e-6, atol=1e-7)
    assert not result["kl"].requires_grad
    assert result["kl"].dtype == torch.float64
    assert metric.names == ("kl", "loss/a.b")
    metric.reset()
    metric.update({"kl": pair(chunks[0])})
    again = metric.compute()
    assert again["kl"] == chunks[0].item()
    assert again["loss/a.b"].isnan()


def test_token_means_in_forward():
    metric = TokenMeans()
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])
    assert metric({"x": pair(a)})["x"] == 2
    assert metric({"x": pair(b), "y": pair(b)})["x"] == 10
    assert {k: float(v) for k, v in metric.compute().items()} == {"x": 4.0, "y": 10.0}


def test_token_means_keep_long_sums_exact():
    metric = TokenMeans(["x"])
    metric.update({"x": (torch.tensor(2.0**24), torch.tensor(2**24))})
    metric.update({"x": (torch.tensor(1.0), torch.tensor(1))})
    assert metric.compute()["x"] == 1.0


PER_RANK = {0: {"a": [1.0], "b": [5.0]}, 1: {"b": [1.0, 2.0, 3.0], "a": [4.0] * 99}}


def two_ranks(rank: int) -> None:
    late, named = TokenMeans(), TokenMeans(["a", "b"])
    values = {k: pair(torch.tensor(v)) for k, v in PER_RANK[rank].items()}
    late.update(values)  # The ranks hold the two names in different order.
    if rank == 1:
        named.update(values)  # Rank 0 has no tokens at all.
    expected = {"a": (1 + 99 * 4) / 100, "b": 11 / 4}
    for _ in range(2):  # The second one must not add the synchronised states once more.
        assert {k: float(v) for k, v in late.compute().items()} == expected
    assert {k: float(v) for k, v in named.compute().items()} == {"a": 4.0, "b": 2.0}


@pytest.mark.filterwarnings("ignore:.*before the ``update``.*")
def test_token_means_over_two_processes(tmp_path):
    two_processes(two_ranks, tmp_path)
