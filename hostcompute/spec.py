"""What an expert is: the records every backend and every packer agrees on.

Letters: T tokens, E experts, K top-k, D model dim, F expert hidden dim.
An expert maps x_D to  down_DF @ h_F + down_bias_D  with
    gated:    h_F = act(gate_FD @ x_D + gate_bias_F, up_FD @ x_D + up_bias_F)
    ungated:  h_F = act(up_FD @ x_D + up_bias_F)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from numbers import Integral


class DType(str, Enum):
    """Element type of weights or activations."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"

    @property
    def itemsize_bytes(self) -> int:
        return 4 if self is DType.F32 else 2


class ActivationKind(str, Enum):
    """The non-linearities of the model families. g is the gate (or, ungated, the only) input, u the up input."""

    SILU = "silu"  # silu(g) * u
    GELU_TANH = "gelu_tanh"  # gelu_tanh(g) * u
    GELU_ERF = "gelu_erf"  # gelu_erf(g) * u
    RELU = "relu"  # relu(g) * u
    RELU2 = "relu2"  # relu(g)^2 * u
    SWIGLU_CLAMP = "swiglu_clamp"  # g <- min(g, limit), u <- clamp(u, -limit, limit); silu(g) * u
    SWIGLU_ALPHA = "swiglu_alpha"  # clamped as above; g * sigmoid(alpha * g) * (u + 1)
    SWIGLU_POST_CLAMP = "swiglu_post_clamp"  # min(silu(g), limit) * clamp(u, -limit, limit)
    SWIGLU_SOFTCAP = "swiglu_softcap"  # cap(g, alpha) * sigmoid(g) * cap(u, limit), cap(x, c) = c tanh(x / c)

    @property
    def needs_gate(self) -> bool:
        return self.value.startswith("swiglu")


@dataclass(frozen=True)
class Activation:
    """A non-linearity and its constants. `limit` and `alpha` are read by the swiglu kinds only."""

    kind: ActivationKind = ActivationKind.SILU
    limit: float = float("inf")
    alpha: float = 1.702

    def __post_init__(self) -> None:
        is_softcap = self.kind is ActivationKind.SWIGLU_SOFTCAP
        if is_softcap and not (0 < self.limit < float("inf") and 0 < self.alpha < float("inf")):
            raise ValueError(
                f"Activation: swiglu_softcap needs finite limit and alpha > 0, got {self.limit} and {self.alpha}"
            )


@dataclass(frozen=True)
class ExpertSpec:
    """Shape and arithmetic of one layer's experts.

    num_experts E, d_model D, d_ffn F. `dtype` is how weights are stored; accumulation is always fp32.
    Biases are optional per expert: `has_bias` says that room for them is kept (missing ones are zero).
    """

    num_experts: int
    d_model: int
    d_ffn: int
    dtype: DType = DType.BF16
    gated: bool = True
    activation: Activation = field(default_factory=Activation)
    has_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "d_model", "d_ffn"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or int(value) >= 2**31:
                raise ValueError(f"ExpertSpec: {name} must be a whole number below 2**31, got {value!r}")
            if int(value) < 1:
                raise ValueError(f"ExpertSpec: {name} must be >= 1, got {value}")
        for name, kind in (("dtype", DType), ("activation", Activation)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"ExpertSpec: {name} must be of {kind.__name__}, got {getattr(self, name)!r}"
                )
        if self.activation.kind.needs_gate and not self.gated:
            raise ValueError(f"ExpertSpec: activation {self.activation.kind.value} needs gated=True")

    @property
    def num_matrices(self) -> int:
        """3 for gate, up, down; 2 for up, down."""
        return 3 if self.gated else 2

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's matrices as stored on disk, without padding and biases."""
        return self.num_matrices * self.d_model * self.d_ffn * self.dtype.itemsize_bytes


@dataclass(frozen=True)
class Cut:
    """One expert of which the rows [first_row, F) of F are computed here; the others, and down_bias, elsewhere.

    first_row is a positive multiple of 32 below F.
    """

    expert_id: int
    first_row: int


@dataclass(frozen=True)
class RoutedCounts:
    """What one forward did: pairs computed, distinct experts touched, weight bytes read from host memory."""

    num_pairs: int
    num_experts: int
    weight_bytes: int
