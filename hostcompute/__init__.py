"""Near-data compute of mixture-of-experts layers in host memory. Usable alone: never imports monde or torch."""

from hostcompute.bank import ExpertBank, PendingForward
from hostcompute.layout import ExpertLayout, make_layout
from hostcompute.places import HostPlaces
from hostcompute.pool import make_pool, shared_pool
from hostcompute.probe import compute_peak, read_bandwidth
from hostcompute.spec import Activation, ActivationKind, Cut, DType, ExpertSpec, RoutedCounts

__all__ = [
    "Activation",
    "ActivationKind",
    "Cut",
    "DType",
    "ExpertBank",
    "ExpertLayout",
    "ExpertSpec",
    "HostPlaces",
    "PendingForward",
    "RoutedCounts",
    "compute_peak",
    "make_layout",
    "make_pool",
    "read_bandwidth",
    "shared_pool",
]
