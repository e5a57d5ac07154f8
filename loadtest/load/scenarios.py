"""What a load consists of: when requests come, how long they are, what they share, who leaves.

No HTTP and no Locust here: a Scenario and a random generator give Plans, the same for the same
seed. Lengths are log-normal, as those of chats are (e.g. the traces of arXiv:2311.18677); one that
falls outside its bounds is drawn again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Log-normal numbers of tokens: `median`, and `sigma` of the logarithm; from `least` on."""

    median: float
    sigma: float
    least: int = 1

    def draw(self, rng: random.Random, most: int) -> int:
        """A length from `least` to `most`. Raises ValueError where these leave hardly any."""
        if self.median > 2 * most or self.least > most:
            raise ValueError(
                f"lengths of {self.least} or more, half of them over {self.median:g}, "
                f"do not fit {most} tokens"
            )
        while True:
            length = round(rng.lognormvariate(math.log(self.median), self.sigma))
            if self.least <= length <= most:
                return length


@dataclass(frozen=True)
class Arrivals:
    """A Poisson process, everywhere alike or in bursts.

    period_s, share: in each period all requests come within its first `share`, at 1/share of the
    rate; share 1 is the plain process.
    """

    period_s: float = 8.0
    share: float = 1.0

    def next(self, now: float, rate: float, rng: random.Random) -> float:
        """When the next request comes, in seconds; rate: requests a second on average.

        A process of varying rate is a plain one whose clock runs only while requests may come.
        """
        running = self._busy(now) + rng.expovariate(rate / self.share)
        periods, rest = divmod(running, self.period_s * self.share)
        return max(now, periods * self.period_s + rest)

    def _busy(self, now: float) -> float:
        """Seconds before `now` in which requests may come."""
        periods, rest = divmod(now, self.period_s)
        busy = self.period_s * self.share
        return periods * busy + min(rest, busy)


@dataclass(frozen=True)
class Plan:
    """One request: its body's fields, and how many tokens its client stays for (None: all)."""

    prompt: tuple[int, ...]
    max_tokens: int
    leaves_after: int | None


@dataclass(frozen=True)
class Scenario:
    """A kind of load.

    long_share: of requests whose prompt has `long_prompt` lengths. shared: how many beginnings of
    `shared_tokens` there are; each prompt has one of them (the k-th 1/k as often as the first)
    before its own tokens. impatient: the share of clients that leave within `patience` tokens.
    """

    name: str
    says: str
    arrivals: Arrivals = Arrivals()
    prompt: Lengths = Lengths(64, 0.8, 4)
    output: Lengths = Lengths(48, 0.7, 4)
    long_share: float = 0.0
    long_prompt: Lengths = Lengths(640, 0.2, 256)
    shared: int = 0
    shared_tokens: int = 256
    impatient: float = 0.0
    patience: Lengths = Lengths(8, 0.7, 1)

    def plan(self, rng: random.Random, pool: Sequence[int], context: int) -> Plan:
        """The next request; pool: token ids to draw prompts of; context: the server's, in tokens.

        Raises ValueError where the scenario's lengths do not fit the context.
        """
        output = self.output.draw(rng, context // 4)
        room = context - output
        beginning: tuple[int, ...] = ()
        if self.shared:
            which = rng.choices(range(self.shared), [1 / (k + 1) for k in range(self.shared)])[0]
            beginning = self._beginning(which, pool)
        lengths = self.long_prompt if rng.random() < self.long_share else self.prompt
        own = lengths.draw(rng, room - len(beginning))
        leaves = self.patience.draw(rng, context) if rng.random() < self.impatient else None
        return Plan((*beginning, *rng.choices(pool, k=own)), output, leaves)

    def _beginning(self, which: int, pool: Sequence[int]) -> tuple[int, ...]:
        """The same in every worker and run."""
        return tuple(random.Random(f"beginning {which}").choices(pool, k=self.shared_tokens))


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("steady", "chat-like: Poisson arrivals, log-normal lengths"),
        Scenario(
            "burst",
            "the same requests, all in the first quarter of every 8 s",
            arrivals=Arrivals(period_s=8.0, share=0.25),
        ),
        Scenario("long", "one prompt in ten is long, among short ones", long_share=0.1),
        Scenario("prefix", "every prompt begins with one of 8 texts of 256 tokens", shared=8),
        Scenario("impatient", "half of the clients leave after some tokens", impatient=0.5),
    )
}
