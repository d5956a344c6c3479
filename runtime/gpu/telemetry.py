"""Where a hybrid token's time and bytes went."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Telemetry"]


@dataclass(slots=True)
class Telemetry:
    """Sums over `tokens` tokens since the last reset; times in seconds of wall clock, sizes in bytes.

    `hot_s` is the device's time on hot neurons, `cold_s` the CPU's on cold ones, `overlap_s` how long both
    worked at once: of layers that have both, as other layers are not timed by themselves. `wait_s` is what
    the CPU waited for the device before a hand-over, for attention and for layers without cold neurons;
    `cpu_layers_s` what layers took that are on the CPU as a whole. All but `total_s` and `tokens` count
    decoded tokens only.
    """

    tokens: int = 0
    decoded: int = 0
    total_s: float = 0.0
    decode_s: float = 0.0
    wait_s: float = 0.0
    hot_s: float = 0.0
    cold_s: float = 0.0
    overlap_s: float = 0.0
    cpu_layers_s: float = 0.0
    hot_fired: int = 0
    cold_fired: int = 0
    cold_computed: int = 0
    handovers: int = 0
    skipped_handovers: int = 0
    bytes_to_host: int = 0
    bytes_to_device: int = 0

    @property
    def hot_hit_rate(self) -> float:
        """Share of the firing neurons that were on the device."""
        return _ratio(self.hot_fired, self.hot_fired + self.cold_fired)

    @property
    def cold_per_token(self) -> float:
        """Cold neurons computed on the CPU per decoded token, all layers together."""
        return _ratio(self.cold_computed, self.decoded)

    @property
    def overlap(self) -> float:
        """Share of the CPU's time on cold neurons during which the device worked on hot ones."""
        return _ratio(self.overlap_s, self.cold_s)

    @property
    def bus_bytes_per_token(self) -> float:
        """Bytes over PCIe per decoded token, both ways."""
        return _ratio(self.bytes_to_host + self.bytes_to_device, self.decoded)

    def as_json(self) -> dict[str, float | None]:
        """All sums and ratios; a ratio of nothing is None, as JSON has no NaN."""
        ratios = ("hot_hit_rate", "cold_per_token", "overlap", "bus_bytes_per_token")
        values = asdict(self) | {name: getattr(self, name) for name in ratios}
        return {name: None if value != value else value for name, value in values.items()}

    def lines(self) -> list[str]:
        """For people."""
        if not self.decoded:
            return ["hybrid:     no token was decoded"]
        ms = 1e3 / self.decoded
        return [
            f"hybrid:     {self.hot_hit_rate:.1%} of firing neurons were hot, {self.cold_per_token:.1f} cold "
            f"neurons per token, {self.skipped_handovers} of {self.skipped_handovers + self.handovers} "
            f"hand-overs skipped, {self.bus_bytes_per_token / 1024:.1f} KiB over the bus per token",
            f"per token:  {self.decode_s * ms:.2f} ms: wait {self.wait_s * ms:.2f}, "
            f"hot {self.hot_s * ms:.2f}, cold {self.cold_s * ms:.2f} ({self.overlap:.0%} overlapped), "
            f"CPU layers {self.cpu_layers_s * ms:.2f}",
        ]


def _ratio(part: float, whole: float) -> float:
    """NaN of nothing."""
    return part / whole if whole else float("nan")
