"""FitDrain: which requests run together now, and on which variant.

The theory, in the order of the code:

1. **Anchor.** The request with the least laxity (time left beyond its fastest possible run, or where several classes
   wait beyond the batch its class drains in) must be in the batch.
2. **Fit: size first.** The largest batch that fits the anchor's slack over its allowed variants. Choosing accuracy
   first buys the best variant for a few and forces the worst on the many.
3. **Drain: then accuracy.** The most accurate variant for that batch such that everybody left behind, and the
   arrivals to be expected meanwhile, would still finish in time on their fastest allowed variants. SlackFit
   (NSDI'25), which looks at the slack alone, lets a backlog build up and then has no slack left.
4. **Overload.** When nothing is safe, give up on the few most urgent requests if the batch behind them yields more
   weighted goodput per executor time (as Nexus, SOSP'19, drops early so that batches stay large). As that always gives
   up on those whom only a slow variant serves, an overload that will pass takes a batch that loses hardly anybody.

A request may run on any variant of its class, so batches mix floor classes: the batch's variant decides who can join,
and nobody joins a variant outside its class. That makes hard floors unbreakable here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from typing import NamedTuple

from server.scheduling.deadline_queue import DeadlineQueue
from server.scheduling.drain import Behind, left_behind, load, lost, shortage
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policy import Choice, Decision, Moment, PassedOver, Run
from server.scheduling.slo import Request

_FILL = 0.85  # a variant that cannot take this share of the fitting batch is passed over for the next
_GIVE_UP_MOST = 64  # urgent requests that overload may pass over
_LOOKED_AT = 8  # so many times the batch size, in requests: who does not fit among these is not looked for further
_GIVE_UP_PENALTY = 0.5
_FEW_LOST = 4.0  # the weight of so few makes overload look like a passing one
_HEADS = 8  # classes whose first request may head a batch that loses few


class FitDrain:
    """The policy; it keeps nothing of its own: forecast and calibrated latencies belong to the model."""

    admits = True

    def arrived(self, model: ModelQueue, request: Request, now_ns: int) -> None:
        """Nothing to learn here."""

    def finished(self, model: ModelQueue, run: Run, compute_ns: int, now_ns: int) -> None:
        """Nothing to learn here."""

    def decide(self, model: ModelQueue, moment: Moment) -> Decision:
        """The batch an idle executor should run now; none where nothing that waits could be in time on it."""
        anchor = model.anchor(moment.now_ns)
        return Decision() if anchor is None else Decision(_choose(model, anchor, moment))


def _choose(model: ModelQueue, anchor: Request, moment: Moment) -> Choice:
    """The batch around the anchor: one that leaves room for tight requests, else one that is safe, else the most."""
    slack_ns = anchor.deadline_ns - REPLY_RESERVE_NS - moment.now_ns
    tried = _Tried()
    responsive_ns = _responsive_ns(model, anchor, moment, slack_ns)
    for within_ns in (slack_ns,) if responsive_ns is None or responsive_ns > slack_ns else (responsive_ns, slack_ns):
        for upgrades in (True, False) if _mixes(model, anchor) else (True,):
            choice = _safe(model, anchor, moment, _Limits(within_ns, upgrades), tried)
            if choice is not None:
                return choice
    return tried.next_best or _overload(model, anchor, moment, tuple(tried.passed_over))


def _responsive_ns(model: ModelQueue, anchor: Request, moment: Moment, slack_ns: int) -> int | None:
    """How long this executor may be busy without failing tight requests that come; None if another is free in time."""
    quickest_ns = model.quickest_ns(anchor.allowed, anchor.samples, anchor.step) or 0
    least_ns = REPLY_RESERVE_NS + quickest_ns  # nothing that could run now would leave room for less
    laxities_ns = [
        laxity
        for each in (model, *moment.others)
        if (laxity := each.patience.laxity_ns(each.quickest_ns, moment.now_ns, slack_ns, least_ns)) is not None
    ]
    if not laxities_ns:
        return None
    laxity_ns = min(laxities_ns) - REPLY_RESERVE_NS
    others_ns = min(moment.others_free_ns, default=None)
    return None if others_ns is not None and others_ns <= moment.now_ns + laxity_ns else laxity_ns


def _mixes(model: ModelQueue, anchor: Request) -> bool:
    """Whether anybody who might join the anchor could also run on a variant that the anchor may not."""
    return any(allowed & ~anchor.allowed for allowed in model.regular.by_shape[anchor.queue_key[1]])


class _Limits(NamedTuple):
    """How long a batch may take, and whether those may join who could also run on something faster than it."""

    within_ns: int
    upgrades: bool


@dataclass(slots=True)
class _Tried:
    """What was passed over on the way to the last choice tried, and the best batch that saves at least those who wait.

    `short_ns` is by how much it fails those who are about to come.
    """

    passed_over: list[PassedOver] = field(default_factory=list)
    next_best: Choice | None = None
    short_ns: int = 0


def _safe(model: ModelQueue, anchor: Request, moment: Moment, limits: _Limits, tried: _Tried) -> Choice | None:
    """The largest batch within the limits, on the most accurate variant that leaves nobody late; or None."""
    within_ns = limits.within_ns
    allowed = model.fitting(anchor.allowed, anchor.samples)
    joiners = _joiners(model, anchor, allowed, upgrades=limits.upgrades)
    size = max(_fit(model, variant, anchor, joiners[variant], within_ns) for variant in allowed)
    if not size:
        return None
    sizes = {variant: min(size, model.latency.max_batch_size(variant)) for variant in allowed}
    fills = {key: _Fill(anchor, *key) for key in dict.fromkeys((joiners[v], sizes[v]) for v in allowed)}
    most = max(fill.samples for fill in fills.values())
    passed_over = tried.passed_over = []
    for variant in allowed:
        fill = fills[joiners[variant], sizes[variant]]
        wanted = int(_FILL * min(most, _waiting_for(anchor, joiners[variant])))
        predicted_ns = model.latency.predict_ns(variant, fill.samples, anchor.step)
        finish_ns = moment.now_ns + predicted_ns
        late_ns = finish_ns + REPLY_RESERVE_NS - fill.deadline_ns
        if late_ns > 0:
            passed_over.append(PassedOver(variant, "slack", late_ns))
        elif predicted_ns > within_ns:
            passed_over.append(PassedOver(variant, "reserve", predicted_ns - within_ns))
        elif fill.samples < wanted:
            passed_over.append(PassedOver(variant, "batch", wanted - fill.samples))
        elif any(short := shortage(fill.behind(model, moment), finish_ns)):
            passed_over.append(PassedOver(variant, "drain", sum(short)))
            if not short.waiting_ns and (tried.next_best is None or short.arriving_ns < tried.short_ns):
                found = Choice(variant, fill.requests, fill.samples, predicted_ns, "drain", tuple(passed_over[:-1]))
                tried.next_best, tried.short_ns = found, short.arriving_ns
        else:
            alone = "retry" if anchor.solo else "pinned" if anchor.pinned else "best"
            reason = passed_over[-1].reason if passed_over else alone
            return Choice(variant, fill.requests, fill.samples, predicted_ns, reason, tuple(passed_over))
    return None


Joiners = tuple[DeadlineQueue, ...]
"""The classes that may join an anchor on one variant; none may where batch-mates would change an answer."""


def _joiners(
    model: ModelQueue, anchor: Request, variants: Sequence[int], *, upgrades: bool = True
) -> dict[int, Joiners]:
    by_class = model.regular.by_shape[anchor.queue_key[1]]
    mates = [(allowed, queue) for allowed, queue in by_class.items() if upgrades or not allowed & ~anchor.allowed]
    return {
        v: tuple(queue for allowed, queue in mates if allowed >> v & 1) if model.variants[v].batchable else ()
        for v in variants
    }


def _waiting_for(anchor: Request, joiners: Joiners) -> int:
    return sum(queue.samples for queue in joiners) or anchor.samples


def _fit(model: ModelQueue, variant: int, anchor: Request, joiners: Joiners, slack_ns: int) -> int:
    """The largest batch around the anchor that this variant can finish within the slack; 0 when not even the anchor."""
    largest = model.latency.largest_batch(variant, slack_ns, anchor.step)
    return min(largest, _waiting_for(anchor, joiners)) if largest >= anchor.samples else 0


class _Fill:
    """The anchor, then whoever is next in order among those who may join and can wait so long, up to `size` samples."""

    def __init__(self, anchor: Request, joiners: Joiners, size: int, finish_ns: int = 0) -> None:
        batch, samples = [anchor], anchor.samples
        for _, _, request in islice(merge(*(queue.entries for queue in joiners)), _LOOKED_AT * size):
            if samples >= size:
                break
            if request is not anchor and samples + request.samples <= size and request.deadline_ns >= finish_ns:
                batch.append(request)
                samples += request.samples
        self.requests = tuple(batch)
        self.samples = samples
        self.deadline_ns = min(request.deadline_ns for request in batch)
        self._behind: Behind | None = None

    def behind(self, model: ModelQueue, moment: Moment) -> Behind:
        """The work that this batch leaves behind."""
        if self._behind is None:
            self._behind = left_behind(model, moment, self.requests)
        return self._behind


def _overload(model: ModelQueue, anchor: Request, moment: Moment, passed_over: tuple[PassedOver, ...]) -> Choice:
    """The batch with the most goodput; where overload will pass, rather one that loses hardly anybody."""
    goodput = _most_goodput(model, anchor, moment.now_ns, passed_over)
    unequal = len({model.fastest(allowed) for allowed, _ in model.regular.classes}) > 1
    if not unequal or load(model, moment) >= 1.0:
        return goodput
    firsts = sorted(floor_class.entries[0] for floor_class in model.regular.classes.values())[:_HEADS]
    heads = dict.fromkeys([anchor, *(request for _, _, request in firsts)])
    choices = [goodput, _fastest_batch(model, anchor, moment.now_ns, passed_over)]
    choices += [_fastest_batch(model, head, moment.now_ns, passed_over, upgrades=False) for head in heads]
    waiting = left_behind(model, moment)
    best, least = goodput, (_FEW_LOST, 0.0)
    for choice in {choice.requests: choice for choice in choices if choice is not None}.values():
        cost = lost(waiting.without(choice.requests), moment.now_ns + choice.predicted_ns, _FEW_LOST), -_rate(choice)
        if cost < least:
            best, least = choice, cost
    return best


def _most_goodput(model: ModelQueue, anchor: Request, now_ns: int, passed_over: tuple[PassedOver, ...]) -> Choice:
    """The batch on a fastest variant that earns the most weight per executor time, giving up on some."""
    best = _fastest_batch(model, anchor, now_ns, passed_over)
    if best is None:
        raise AssertionError("the anchor fits an executor, or it would not be one. This is a bug.")
    best_score = _rate(best)
    given_up = 0.0
    fastest = model.fastest(model.eligible)
    ordered = merge(*(waiting.entries for waiting in model.regular.classes.values()))
    for place, (_, _, head) in enumerate(islice(ordered, _GIVE_UP_MOST + 1)):
        if place & (place - 1) == 0:  # giving up on 0, 1, 2, 4, 8 ...
            candidate = _fastest_batch(model, head, now_ns, passed_over)
            if candidate is not None:
                score = (_weight(candidate) - _GIVE_UP_PENALTY * given_up) / candidate.predicted_ns
                if score > best_score:
                    best, best_score = candidate, score
                if candidate.variant == fastest and candidate.samples == model.latency.max_batch_size(fastest):
                    break  # giving up on more cannot make the batch any larger
        given_up += head.weight
    return best


def _weight(choice: Choice) -> float:
    return sum(request.weight for request in choice.requests)


def _rate(choice: Choice) -> float:
    return _weight(choice) / choice.predicted_ns


def _fastest_batch(
    model: ModelQueue, head: Request, now_ns: int, passed_over: tuple[PassedOver, ...], *, upgrades: bool = True
) -> Choice | None:
    """The largest batch around `head` that finishes within its slack, on the variant that takes the most; or None."""
    slack_ns = head.deadline_ns - REPLY_RESERVE_NS - now_ns
    joiners = _joiners(model, head, model.fitting(head.allowed, head.samples), upgrades=upgrades)
    fits = {v: _fit(model, v, head, joiners[v], slack_ns) for v in joiners}
    variant = max(fits, key=lambda v: (fits[v], -model.latency.predict_ns(v, head.samples, head.step)))
    if not fits[variant]:
        return None
    full_ns = model.latency.predict_ns(variant, fits[variant], head.step)
    fill = _Fill(head, joiners[variant], fits[variant], now_ns + full_ns + REPLY_RESERVE_NS)
    predicted_ns = model.latency.predict_ns(variant, fill.samples, head.step)
    return Choice(variant, fill.requests, fill.samples, predicted_ns, "overload", passed_over)
