"""A model's latency profiles on this host: remembered or measured at load; alone, beside others, by the input's length.

Rules: every candidate is measured alone, in turns with the others; the one that serves its variant is measured further.
What fails on the way is told and costs no other candidate its profile.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from server.candidates import Candidate, Host, device_of
from server.eligibility import served_ns
from server.wire.inference import Signature
from variants.crowd import at_least, crowd
from variants.lengths import length_of, measure_lengths, scaled_examples
from variants.measure import (
    Example,
    ProfileKey,
    Profiles,
    batch_of,
    describe_inputs,
    find_failures,
    measure_profiles,
    profile_batch_sizes,
)
from variants.runtimes import runtime_version
from variants.variant import LatencyProfile

log = logging.getLogger(__name__)

CandidateKey = tuple[str, str]
Failures = dict[CandidateKey, str]

_ALONE_S, _CROWDED_S, _LENGTHS_S = 6.0, 4.0, 2.0


def profile_key(
    host: Host, *, sha256: str, runtime: str, precision: str, sizes: tuple[int, ...], example: Example
) -> ProfileKey:
    """What a profile is remembered under."""
    return ProfileKey(
        artefact_sha256=sha256,
        runtime=runtime,
        runtime_version=runtime_version(runtime),
        precision=precision,
        threads=host.threads,
        device=device_of(runtime, host),
        host=host.hardware.fingerprint,
        batch_sizes=sizes,
        inputs=describe_inputs(example),
        executors=host.executors,
    )


@dataclass(frozen=True, slots=True)
class Profiler:
    """Measures one model's candidates with `example`, or finds what was measured before."""

    model: str
    signature: Signature
    example: Example
    host: Host

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes that are measured."""
        return profile_batch_sizes(self.signature.max_batch_size) if self.signature.max_batch_size else (1,)

    def choose(
        self, candidates: Sequence[Candidate]
    ) -> tuple[dict[str, Candidate], dict[str, Profiles], dict[CandidateKey, str]]:
        """For each variant the candidate that serves it, by name, and its profiles; and why the others cannot run."""
        alone, failures = self._alone(candidates)
        fastest = _fastest([candidate for candidate in candidates if candidate.key in alone], alone)
        crowded, too_much = self._crowded(list(fastest.values()), alone)
        fastest = {name: candidate for name, candidate in fastest.items() if candidate.key not in too_much}
        lengths = self._lengths(list(fastest.values()), alone)
        profiles = {
            name: Profiles(alone[chosen.key], crowded.get(chosen.key), lengths.get(chosen.key))
            for name, chosen in fastest.items()
        }
        return fastest, profiles, failures | too_much

    def _alone(self, candidates: Sequence[Candidate]) -> tuple[dict[CandidateKey, LatencyProfile], Failures]:
        """Each candidate's profile while nothing else runs; and why those without one failed."""
        found = {c.key: profile for c in candidates if (profile := self._remembered(c).alone)}
        missing = {c.key: c for c in candidates if c.key not in found}
        if not missing:
            return found, {}
        self._announce("measuring", missing)
        sessions = {key: candidate.session for key, candidate in missing.items()}
        failures = find_failures(sessions, self.example, self.sizes)
        healthy = {key: session for key, session in sessions.items() if key not in failures}
        measured = measure_profiles(healthy, self.example, self.sizes, budget_s=_ALONE_S)
        for key, profile in measured.items():
            self._remember(missing[key], replace(self._remembered(missing[key]), alone=profile))
        return found | measured, {key: f"on {key[1]} {why}" for key, why in failures.items()}

    def _crowded(
        self, candidates: Sequence[Candidate], alone: dict[CandidateKey, LatencyProfile]
    ) -> tuple[dict[CandidateKey, LatencyProfile], Failures]:
        """Profiles while every other executor runs the same, where there are others; and why those without one failed.

        A GPU has one executor to itself; more of them are an operator's choice, of which nothing is measured.
        """
        executors = self.host.executors
        if executors < 2 or self.host.device != "cpu":
            return {}, {}
        found = {c.key: at_least(profile, alone[c.key]) for c in candidates if (profile := self._remembered(c).crowded)}
        missing = {c.key: c for c in candidates if c.key not in found}
        if not missing:
            return found, {}
        self._announce(f"measuring beside {executors - 1} more", missing)
        sessions = {key: candidate.session for key, candidate in missing.items()}
        company = crowd(executors - 1)
        failures = find_failures(sessions, self.example, self.sizes[-1:], company=company)
        healthy = {key: session for key, session in sessions.items() if key not in failures}
        measured = measure_profiles(healthy, self.example, self.sizes, budget_s=_CROWDED_S, company=company)
        for key, profile in measured.items():
            found[key] = at_least(profile, alone[key])
            self._remember(missing[key], replace(self._remembered(missing[key]), crowded=found[key]))
        return found, {key: f"on {key[1]}, run {executors} at a time, {why}" for key, why in failures.items()}

    def _lengths(
        self, candidates: Sequence[Candidate], alone: dict[CandidateKey, LatencyProfile]
    ) -> dict[CandidateKey, tuple[tuple[int, LatencyProfile], ...]]:
        """Profiles by the length of the inputs, where a request chooses it."""
        found = {c.key: lengths for c in candidates if (lengths := self._remembered(c).lengths) is not None}
        examples = scaled_examples(self.example, self.signature.inputs, batched=self.signature.max_batch_size > 0)
        missing = {c.key: c for c in candidates if c.key not in found}
        if not missing or not examples:
            return found
        self._announce(f"measuring inputs of {', '.join(map(str, sorted(examples)))} elements with", missing)
        sessions = {key: candidate.session for key, candidate in missing.items()}
        length = length_of(batch_of(self.example, 1))
        measured = measure_lengths(sessions, examples, alone, length, budget_s=_LENGTHS_S)
        for key, lengths in measured.items():
            self._remember(missing[key], replace(self._remembered(missing[key]), lengths=lengths))
        return found | measured

    def _announce(self, what: str, candidates: Collection[CandidateKey]) -> None:
        label = ", ".join(f"{variant} on {runtime}" for variant, runtime in candidates)
        log.info("model %s: %s %s at batch sizes %s", self.model, what, label, ", ".join(map(str, self.sizes)))

    def _key(self, candidate: Candidate) -> ProfileKey:
        return profile_key(
            self.host,
            sha256=candidate.sha256,
            runtime=candidate.runtime,
            precision=candidate.precision,
            sizes=self.sizes,
            example=self.example,
        )

    def _remembered(self, candidate: Candidate) -> Profiles:
        return self.host.profiles.get(self._key(candidate))

    def _remember(self, candidate: Candidate, profiles: Profiles) -> None:
        self.host.profiles.put(self._key(candidate), profiles)


def _fastest(candidates: list[Candidate], profiles: Mapping[CandidateKey, LatencyProfile]) -> dict[str, Candidate]:
    """For each variant the candidate with the least time per sample, as it would be served, over all batch sizes."""

    def time_per_sample(candidate: Candidate) -> float:
        profile = profiles[candidate.key]
        return sum(served_ns(profile, n, batchable=candidate.is_invariant) / n for n in profile.batch_sizes)

    fastest: dict[str, Candidate] = {}
    for candidate in candidates:
        other = fastest.get(candidate.variant)
        if other is None or time_per_sample(candidate) < time_per_sample(other):
            fastest[candidate.variant] = candidate
    return fastest
