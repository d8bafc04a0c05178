"""Measures the energy a machine uses: processors by RAPL, NVIDIA GPUs by the power they report."""

import contextlib
import shutil
import subprocess
import time
from pathlib import Path

POWERCAP = Path('/sys/class/powercap')


class Energy:
    """Counts the energy of this machine over all starts of a run; None if it cannot be measured.

    Processors have counters (on Linux, if the file is readable, often only for root). GPUs report their
    current power, which is assumed for all the time since the last reading.
    """

    def __init__(
        self, joules: float | None = None, powercap: Path = POWERCAP, smi: str = 'nvidia-smi'
    ) -> None:
        """joules: used by earlier starts. powercap, smi: the folder of the counters, and the command."""
        self.joules = joules
        self._zones = [zone for zone in powercap.glob('intel-rapl:*') if zone.name.count(':') == 1]
        self._smi = shutil.which(smi)
        self._counts, self._clock = self._read(), time.monotonic()

    def _read(self) -> dict[Path, int]:
        """The counter of each processor, in microjoules."""
        counts = {}
        for zone in self._zones:
            with contextlib.suppress(OSError, ValueError):
                counts[zone] = int((zone / 'energy_uj').read_text())
        return counts

    def update(self) -> None:
        """Add the energy used since the last call; call it at least every few minutes."""
        counts, clock, used = self._read(), time.monotonic(), []
        for zone, count in counts.items():
            before = self._counts.get(zone, count)
            with contextlib.suppress(OSError, ValueError):
                around = int((zone / 'max_energy_range_uj').read_text()) if count < before else 0
                used.append((count - before + around) / 1e6)
        if self._smi:
            with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
                query = [self._smi, '--query-gpu=power.draw', '--format=csv,noheader,nounits']
                watts = subprocess.run(query, capture_output=True, text=True, timeout=5).stdout.split()
                used.append(sum(map(float, watts)) * (clock - self._clock))
        self._counts, self._clock = counts, clock
        if used:
            self.joules = (self.joules or 0.0) + sum(used)
