"""What a benchmark measures: the records that pass from measuring to presenting."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from monde.cli.machine import Machine
from monde.core import Counters


@dataclass(frozen=True)
class BenchTest:
    """One shape to time: a prompt of num_prompt tokens or num_generated steps, of `batch` sequences at once.

    Exactly one of the two is above 0. `depth` tokens lie in the KV cache before the clock starts.
    """

    num_prompt: int
    num_generated: int
    depth: int
    batch: int

    @property
    def name(self) -> str:
        """As llama-bench writes it: pp512, tg128, pp512 @ d1024."""
        base = f"pp{self.num_prompt}" if self.num_prompt else f"tg{self.num_generated}"
        return f"{base} @ d{self.depth}" if self.depth else base

    @property
    def num_tokens(self) -> int:
        """Tokens processed under the clock, over the batch."""
        return self.batch * (self.num_prompt or self.num_generated)

    @property
    def num_positions(self) -> int:
        """The length that a sequence reaches."""
        return self.depth + self.num_prompt + self.num_generated


@dataclass(frozen=True)
class ModelFacts:
    """The model under test. weight_bytes is what its parameters take in the type they are run in."""

    name: str
    model_type: str
    num_params: int
    weight_bytes: int
    dtype: str
    vocab_size: int
    num_positions: int | None  # the longest sequence it takes; None when its configuration does not say
    is_encoder_decoder: bool = False


@dataclass(frozen=True)
class Loading:
    """What loading cost; bytes are growth of this process's resident memory."""

    duration_s: float
    peak_host_bytes: int
    left_host_bytes: int  # of the growth, what stayed


@dataclass(frozen=True)
class RunnerFacts:
    """Who runs the model, how, and what loading it cost."""

    label: str  # monde, transformers:eager, ...
    backend: str  # what computes the experts, in words
    device: str
    num_threads: int
    loading: Loading
    num_ranks: int = 1  # each with a batch of its own; counters and memory are those of the first


@dataclass(frozen=True)
class Sample:
    """One timed repetition; counters where the runner keeps them."""

    duration_s: float
    counters: Counters | None


@dataclass(frozen=True)
class TestResult:
    """One test by one runner. `skipped` says why there are no samples.

    agreement: share of next tokens equal to the first baseline's on the same text; None: not compared.
    """

    runner: RunnerFacts
    test: BenchTest
    samples: tuple[Sample, ...]
    peak_host_bytes: int = 0
    peak_gpu_bytes: int = 0
    agreement: float | None = None
    skipped: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Mean over the repetitions, as llama-bench has it; of all ranks together."""
        return statistics.fmean(self._speeds())

    @property
    def tokens_per_s_std(self) -> float:
        speeds = self._speeds()
        return statistics.stdev(speeds) if len(speeds) > 1 else 0.0

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token: the prompt in, one token chosen. Of prompt tests."""
        return self.mean_duration_s if self.test.num_prompt else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token of one sequence. Of generation tests."""
        return self.mean_duration_s / self.test.num_generated if self.test.num_generated else None

    @property
    def mean_duration_s(self) -> float:
        return statistics.fmean(sample.duration_s for sample in self.samples)

    @property
    def resident_share(self) -> float | None:
        """Routed pairs computed from a copy on the GPU."""
        num_pairs = self._sum("num_pairs")
        return None if not num_pairs else (self._sum("num_resident_pairs") or 0) / num_pairs

    def per_token(self, counter: str) -> float | None:
        """A byte counter over the tokens processed."""
        total = self._sum(counter)
        return None if total is None else total / (len(self.samples) * self.test.num_tokens)

    @property
    def host_bytes_per_s(self) -> float | None:
        """Expert weights read from host memory over the time the host computed."""
        busy_s = self._sum("host_busy_s")
        return None if not busy_s else (self._sum("host_weight_bytes") or 0) / busy_s

    def _speeds(self) -> list[float]:
        num_tokens = self.test.num_tokens * self.runner.num_ranks
        return [num_tokens / sample.duration_s for sample in self.samples]

    def _sum(self, counter: str) -> float | None:
        values = [getattr(sample.counters, counter) for sample in self.samples if sample.counters is not None]
        return sum(values) if values else None


@dataclass(frozen=True)
class BenchReport:
    """Everything one run of `monde bench` found out. read_ceiling_bytes_per_s is the plain read
    test of this machine; None without the native module."""

    command: str
    started: str  # ISO 8601, UTC
    machine: Machine
    model: ModelFacts
    text: str  # what the tokens were
    read_ceiling_bytes_per_s: float | None
    results: tuple[TestResult, ...]

    def host_share_of_ceiling(self, result: TestResult) -> float | None:
        """How close the host's reading of weights comes to the plain read test."""
        if result.host_bytes_per_s is None or self.read_ceiling_bytes_per_s is None:
            return None
        return result.host_bytes_per_s / self.read_ceiling_bytes_per_s

    def speedup(self, result: TestResult) -> float | None:
        """Speed over that of the fastest baseline in the same test; None without one."""
        rivals = [
            other.tokens_per_s
            for other in self.results
            if other.test == result.test and other.runner.label != "monde" and not other.skipped
        ]
        return result.tokens_per_s / max(rivals) if rivals and not result.skipped else None
