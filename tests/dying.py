"""An estimator that fails on the second process, after some steps."""

from __future__ import annotations

from typing import Any

from torch import distributed

from iqstar.errors import InputError
from iqstar.estimators import NullEstimator


class Dying(NullEstimator):
    """NullEstimator for one rollout; then rank 1 gives up."""

    calls = 0

    def estimate(self, *arguments: Any) -> Any:
        """See NullEstimator."""
        self.calls += 1
        if self.calls > 1 and distributed.get_rank() == 1:
            raise InputError("data.path: rank 1 had enough")
        return super().estimate(*arguments)
