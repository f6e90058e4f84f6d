"""Measuring one config during a search: short rounds beside the default, so that drift cancels."""

from __future__ import annotations

import itertools
import math
import random
import time
from dataclasses import replace

import numpy as np

from rooftune import race
from rooftune.autotune.journal import Trial, canonical
from rooftune.core import Config, Problem, Status, Unavailable
from rooftune.lab import Lab, Reply
from rooftune.registry import Impl
from rooftune.results import statistics

ROUNDS = 3  # per config that is not cut; its ratio to the default is a median of three
CONTENDER_ROUNDS = 6  # of a config whose interval still overlaps the leader's
Z = 2.0  # half width of an interval in standard deviations of the mean
# Standard deviation of a round's log ratio before it is known: single calls on a shared CPU vary by 35 %, a round's
# 25 % order statistic by less.
NOISE, NOISE_AFTER = 0.14, 8
FAR = math.log(3)  # this much farther behind, a single round is enough; else it takes two, in case one was disturbed


class Bench:
    """Measures configs of one competitor on one problem.

    The default config is prepared once and timed in every round of every config, in random order; a
    config's value is the ratio. Where the default itself does not run, configs are timed alone.
    """

    def __init__(
        self,
        lab: Lab,
        impl: Impl,
        problem: Problem,
        default: Config,
        options: race.Options,
        max_error: float | None,
    ) -> None:
        self.lab, self.impl, self.problem, self.default = lab, impl, problem, default
        self.options, self.max_error = options, max_error
        self.reference: race.Entrant | None = None
        self.leader, self.leader_rounds = math.inf, 1  # best value so far, and from how many rounds
        self.unrest = NOISE  # what is assumed of a round's log ratio before enough are known
        self.steps: list[float] = []  # |difference| of the log ratios of two successive rounds of one config
        self.default_reason = ""  # why the default does not run

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._release(self.reference)

    def measure(self, config: Config) -> Trial:
        """Build, check on the problem itself, and time. Failures are outcomes, not exceptions."""
        start = time.monotonic()
        trial = self._default() if config == self.default else self._beside(config)
        trial.spent_s = time.monotonic() - start
        self.leads(trial)
        return trial

    def leads(self, trial: Trial) -> None:
        """Take note of an outcome: it may be the one to beat."""
        if trial.value is not None and trial.value < self.leader:
            self.leader, self.leader_rounds = trial.value, max(1, len(trial.rounds))

    @property
    def noise(self) -> float:
        """Standard deviation of a round's log ratio, from the steps between rounds of all configs so far.

        By their median: rounds that a neighbour on the machine disturbed would otherwise hide every difference.
        """
        if len(self.steps) < NOISE_AFTER:
            return self.unrest
        middle = sorted(self.steps)[len(self.steps) // 2]
        return max(1e-3, 1.4826 * middle / math.sqrt(2))

    def ensure_default(self) -> None:
        """Prepare the default if it is not: after a resume, its outcome is known but nothing is built."""
        if self.reference is None and not self.default_reason:
            entrant, reply = self._prepare(self.default)
            self.reference = entrant if reply.ok else None
            self.default_reason = "" if reply.ok else f"{reply.status} {reply.reason}"

    # --- parts ---

    def _seed(self, config: Config) -> int:
        return random.Random(f"{self.options.seed}:{self.problem}:{canonical(config)}").getrandbits(31)

    def _prepare(self, config: Config) -> tuple[race.Entrant, Reply]:
        entrant = race.Entrant(self.impl, config, config == self.default)
        reply = self.lab.prepare(self.impl, self.problem, config, self._seed(config), thorough=False)
        entrant.error = reply.data.get("error")
        if reply.ok:
            entrant.handle = reply.data["handle"]
        else:
            entrant.fail(reply)
        return entrant, reply

    def _release(self, entrant: race.Entrant | None) -> None:
        if entrant is not None and entrant.handle is not None:
            self.lab.release(self.impl, entrant.handle)
            entrant.handle = None

    def _default(self) -> Trial:
        """The default's own outcome; its ratio is 1."""
        entrant, _ = self._prepare(self.default)
        if entrant.status == Status.OK:
            race.time_rounds(self.lab, self.problem, [entrant], self._options(self.default), ROUNDS, _quiet)
        trial = _trial(entrant)
        if entrant.status != Status.OK:
            self.default_reason = f"{entrant.status} {entrant.reason}"
            return trial
        trial.ratio = 1.0
        self.reference = entrant
        single = np.log(statistics.q25(entrant.rounds))
        # Two rounds of one time differ by sqrt(2) of its deviation, and so does a ratio of two times in one round.
        self.unrest = max(NOISE, 1.4826 * float(np.median(np.abs(np.diff(single)))))
        return trial

    def _options(self, config: Config) -> race.Options:
        return replace(self.options, seed=self._seed(config), thorough=False)

    def _beside(self, config: Config, again: bool = False) -> Trial:
        candidate, reply = self._prepare(config)
        if not reply.ok:
            self._probe(reply)
            return _trial(candidate)
        trial = _trial(candidate)
        if self.max_error is not None and (trial.rel_fro is None or trial.rel_fro > self.max_error):
            self._release(candidate)
            reason = f"error {trial.rel_fro:.2e} is above the allowed {self.max_error:.1e}" if trial.rel_fro else ""
            return replace(trial, status=Status.SKIPPED, reason=reason or "its error is not known")
        try:
            cut = self._rounds(candidate)
        finally:
            self._release(candidate)
        if self.reference is not None and self.reference.status != Status.OK:
            return self._blame(config, again)
        return self._outcome(candidate, cut)

    def _rounds(self, candidate: race.Entrant) -> bool:
        """Time it round by round; True if it was cut because its interval lies above the leader's.

        A config in whose interval the leader's value lies gets more rounds than the others: it may be the winner.
        """
        field = [candidate] if self.reference is None else [self.reference, candidate]
        for entrant in field:
            entrant.rounds = []
        options = self._options(candidate.config)
        for number in range(CONTENDER_ROUNDS):
            each = replace(options, seed=options.seed + number)
            handle = candidate.handle
            # The last of the usual rounds always ends with a check of the timed output.
            race.time_rounds(self.lab, self.problem, field, each, 1, _quiet, last=number >= ROUNDS - 1)
            if candidate.status == Status.WRONG and handle is not None:
                self.lab.release(self.impl, handle)  # its worker lives on, and with it the tensors
            if any(entrant.status != Status.OK for entrant in field):
                break
            behind, least = self._behind(candidate)
            reach = Z * self.noise * math.sqrt(1 / (number + 1) + 1 / self.leader_rounds)
            if number + 1 < ROUNDS and least > reach + (FAR if number == 0 else 0.0):
                self._learn(candidate)
                return True
            if number + 1 >= ROUNDS and not behind < reach:
                break
        self._learn(candidate)
        return False

    def _behind(self, candidate: race.Entrant) -> tuple[float, float]:
        """How far its rounds lie behind the leader, as logs: the median, and the best of them.

        A neighbour on the machine makes a round several times too slow, so only the best one condemns a config.
        NaN while there is no leader.
        """
        if not math.isfinite(self.leader):
            return math.nan, math.nan
        if self.reference is None:
            logs = np.log(statistics.q25(candidate.rounds))
        else:
            logs = statistics.paired_logs(candidate.rounds, self.reference.rounds)
        if not np.isfinite(logs).any():
            return math.nan, math.nan
        return float(np.nanmedian(logs)) - math.log(self.leader), float(np.nanmin(logs)) - math.log(self.leader)

    def _learn(self, candidate: race.Entrant) -> None:
        """How much two rounds of one config differ."""
        if self.reference is not None and all(e.status == Status.OK for e in (candidate, self.reference)):
            logs = statistics.paired_logs(candidate.rounds, self.reference.rounds)
            self.steps += [abs(float(b - a)) for a, b in itertools.pairwise(logs)]

    def _outcome(self, candidate: race.Entrant, cut: bool) -> Trial:
        trial = _trial(candidate, cut)
        if trial.time_s is not None and self.reference is not None:
            logs = statistics.paired_logs(candidate.rounds, self.reference.rounds)
            if not len(logs):
                return replace(trial, status=Status.FAILED_CRASH, reason="no round is left to compare", time_s=None)
            trial.ratio = math.exp(float(np.median(logs)))
        return trial

    def _probe(self, reply: Reply) -> None:
        """After a failure that may have taken the worker or its device context along, bring the default back."""
        if self.reference is None or reply.status in (Status.WRONG, Status.SKIPPED, Status.FAILED_COMPILE):
            return
        if reply.status == Status.FAILED_LAUNCH and self.reference.handle is not None:
            answer = self.lab.time(self.impl, self.reference.handle, self._seed(self.default), verify=False, samples=1)
            if answer.ok:
                return  # such as "out of shared memory": the context is sound
        self._revive()

    def _revive(self) -> None:
        """A fresh worker with the default prepared.

        Raises:
            Unavailable: the default ran before and does not any more: nothing can be compared.
        """
        self.lab.retire(self.impl)
        self.reference = None
        self.ensure_default()
        if self.reference is None:
            raise Unavailable(
                f"{self.impl.key}: the default config ran before and now it does not ({self.default_reason}); "
                "the journal is kept, run the same command to go on"
            )

    def _blame(self, config: Config, again: bool) -> Trial:
        """The default failed beside this config: once may be chance, twice in fresh workers is the config's doing."""
        assert self.reference is not None
        reason = self.reference.reason
        self._revive()
        if not again:
            return self._beside(config, again=True)
        return Trial(config, Status.FAILED_CRASH, f"the default config failed beside it: {reason}")


def _trial(entrant: race.Entrant, cut: bool = False) -> Trial:
    trial = Trial(entrant.config, entrant.status, entrant.reason, cut=cut)
    trial.rel_fro = (entrant.error or {}).get("rel_fro")
    trial.rounds = [samples for samples in entrant.rounds if samples]
    if entrant.status == Status.OK and trial.rounds:
        trial.time_s = statistics.summary(trial.rounds)[0]
    return trial


def _quiet(kind: str, text: str) -> None:
    """Rounds of a search are too many to be told."""
