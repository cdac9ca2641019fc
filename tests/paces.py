"""A pace that a test sets."""

from attrs import define


@define
class LearnedPace:
    """What a client has learned of a limit of all accounts."""

    learned_rate: float | None

    def adopt(self, rate: float) -> None:
        """Keep to a rate."""
        self.learned_rate = rate
