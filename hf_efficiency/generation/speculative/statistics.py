"""What speculation gained."""

from dataclasses import dataclass, field


@dataclass
class SpeculativeStatistics:
    """Counts of one or more calls of `generate`.

    Attributes:
        drafted: By position in a draft (0 is next): how often a token was there to be verified after all before it had
            been accepted.
        accepted: By position: how often it was accepted.
        tokens: Generated.
        target_forwards: Forwards of the target, without prefills, times rows still being written.
        plain_forwards: Those of them that verified no draft.
        draft_seconds, verify_seconds, prefill_seconds: Time in drafting, in the target's forwards with acceptance, and
            in prefills: CPU seconds of the process on a CPU, wall time on other devices.
    """

    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    tokens: int = 0
    target_forwards: int = 0
    plain_forwards: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    prefill_seconds: float = 0.0

    @property
    def acceptance_rate(self) -> list[float]:
        """By position: the share of tokens accepted, of those verified there."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]

    @property
    def mean_acceptance(self) -> float:
        """The share of verified tokens that were accepted."""
        return sum(self.accepted) / max(1, sum(self.drafted))

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens for each forward of the target; 1 without speculation."""
        return self.tokens / max(1, self.target_forwards)

    def record(self, available: int, accepted: int) -> None:
        """One row of one verification: the draft's depth, and how many tokens of it were accepted."""
        while len(self.drafted) < available:
            self.drafted.append(0)
            self.accepted.append(0)
        for depth in range(min(available, accepted + 1)):
            self.drafted[depth] += 1
            self.accepted[depth] += depth < accepted

    def summary(self) -> str:
        """One line."""
        rates = ", ".join(f"{rate:.2f}" for rate in self.acceptance_rate[:5])
        return (
            f"{self.tokens} tokens, {self.tokens_per_forward:.2f} a target forward; "
            f"acceptance {self.mean_acceptance:.2f} (by position {rates or '-'}); "
            f"{self.draft_seconds:.2f} s drafting, {self.verify_seconds:.2f} s verifying"
        )
