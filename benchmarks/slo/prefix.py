"""The obvious way to serve mixed accuracy floors: the most urgent requests together, as the strictest of them demands.

No paper is its source: it is what a batcher becomes when a floor is checked after the batch was formed. FitDrain is
compared with it on mixed floors only; without floors it is MaxBatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import merge
from itertools import islice

from server.scheduling.model_queue import ModelQueue
from server.scheduling.policies import PolicyFactory, policy_factory
from server.scheduling.policies.batches import (
    HOPELESS,
    Baseline,
    Line,
    Pick,
    Rule,
    fastest_for,
    slack_ns,
    throughput_batch,
)
from server.scheduling.policy import Moment
from server.scheduling.slo import Request


def policy_named(name: str) -> PolicyFactory:
    """The policy of this name: "prefix" and "prefix+ed" from here, any other from the server. Raises ValueError."""
    if name.removesuffix("+ed") == "prefix":
        return lambda: Baseline(Prefix(), early_drop=name.endswith("+ed"))
    return policy_factory(name)


class Prefix(Rule):
    """The longest prefix of the queue that a variant allowed to all of it finishes in time; then the best such variant.

    One sample per request.
    """

    def pick(self, head: Request, line: Line, moment: Moment) -> Pick | None:
        """The batch of the head and those right behind it."""
        model, slack = line.model, slack_ns(head, moment.now_ns)
        best, allowed = None, -1
        for size, request in enumerate(_from(head, model), 1):
            allowed &= request.allowed
            fits = [v for v in model.fitting(allowed, size) if model.latency.predict_ns(v, size, head.step) <= slack]
            if fits:
                best = fits[0], size
        fastest = fastest_for(model, head)
        if best is None or fastest is None:
            return HOPELESS
        return Pick(*best, throughput_batch(model, fastest))


def _from(head: Request, model: ModelQueue) -> Sequence[Request]:
    """The head and the requests of its shape behind it, as many as the largest batch holds."""
    same = [queue.entries for (_, shape), queue in model.queues.items() if shape == head.shape]
    behind = (request for *key, request in merge(*same) if key >= [head.order_ns, head.number])
    most = max(model.latency.max_batch_size(variant) for variant in range(len(model.variants)))
    return list(islice(behind, most))
