"""How deep to draft: the depth that promises most tokens per second, from what was measured so far; 0 if none pays."""

from hf_efficiency.generation.speculative.tree import TreeShape

_PRIOR_RATE, _PRIOR_COUNT = 0.6, 2.0
_FORGET = 0.97  # weight that a verification keeps when the next one comes
_SMOOTH = 0.3
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 256
_GAIN = 1.02  # a draft must promise so much more than none


class DraftControl:
    """Chooses the depth of each draft.

    With rates a_1, a_2, ... of acceptance at each depth, a draft of depth D gives 1 + a_1 + a_1 a_2 + ... tokens, for D
    times the time of a drafted level and the time of a verification, which grows linearly with the tokens verified.
    Where no draft promises more than a plain step, nothing is drafted for a while that doubles each time.

    Args:
        branching: The largest draft.
        adapt: Whether to choose; else every draft is the largest.
    """

    def __init__(self, branching: tuple[int, ...], adapt: bool = True) -> None:
        self.branching, self.adapt = branching, adapt
        self.nodes = [len(TreeShape(branching[:depth]).parents) for depth in range(len(branching) + 1)]
        self.rates: dict[int, list[list[float]]] = {}  # by strength and depth: weights of accepted and of all
        self.plain_time: float | None = None
        self.slope = 0.05  # of a verification, per token more, in plain steps
        self.level_time = 0.0
        self.pause, self.wait = _FIRST_PAUSE, 0

    def depth(self, room: int, strength: int = 0, *, free: bool = False) -> int:
        """The depth to draft.

        Args:
            room: Tokens that may still be written after the next one.
            strength: Class of the draft at hand: 0, or how many tokens of the text speak for it.
            free: Whether drafts cost nothing, so that there is no reason to pause.
        """
        most = max(0, min(len(self.branching), room))
        if not self.adapt or most == 0:
            return most
        if self.plain_time is None:
            return 0  # the first step is the measure
        if self.wait > 0 and not free:
            self.wait -= 1
            return 0
        best, found = 1.0 if free else 1.0 / _GAIN, 0
        gain, chance = 1.0, 1.0
        for depth in range(1, most + 1):
            chance *= self.rate(strength, depth)
            gain += chance
            cost = 1 + self.slope * self.nodes[depth] + depth * self.level_time / self.plain_time
            if gain / cost > best * _GAIN:
                best, found = gain / cost, depth
        if found == 0 and not free:
            self.wait = self.pause
            self.pause = min(2 * self.pause, _LONGEST_PAUSE)
            for weights in self.rates.get(
                strength, []
            ):  # what is long ago counts less, or nothing would be tried again
                weights[0], weights[1] = weights[0] / 2, weights[1] / 2
        return found

    def rate(self, strength: int, depth: int) -> float:
        """The acceptance expected at a depth (from 1), given acceptance before it."""
        weights = self.rates.get(strength, [])
        accepted, total = weights[depth - 1] if depth <= len(weights) else (0.0, 0.0)
        first = strength / (strength + 3) if strength else _PRIOR_RATE
        prior = first if depth == 1 else self.rate(strength, depth - 1)
        return (accepted + prior * _PRIOR_COUNT) / (total + _PRIOR_COUNT)

    def record(self, strength: int, available: int, accepted: int) -> None:
        """One verified row."""
        weights = self.rates.setdefault(strength, [])
        while len(weights) < available:
            weights.append([0.0, 0.0])
        for depth in range(min(available, accepted + 1)):
            pair = weights[depth]
            pair[0], pair[1] = pair[0] * _FORGET + (depth < accepted), pair[1] * _FORGET + 1
        if accepted:
            self.pause = _FIRST_PAUSE

    def time(self, nodes: int, depth: int, draft_seconds: float, verify_seconds: float) -> None:
        """The time of one step that verified `nodes` drafted tokens of `depth` levels."""
        if nodes == 0:
            self.plain_time = _mean(self.plain_time, verify_seconds)
            return
        if depth:
            self.level_time = _mean(self.level_time or None, draft_seconds / depth)
        if self.plain_time:
            slope = (verify_seconds / self.plain_time - 1) / nodes
            self.slope = _mean(self.slope, min(1.0, max(0.0, slope)))


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - _SMOOTH) * old + _SMOOTH * new
