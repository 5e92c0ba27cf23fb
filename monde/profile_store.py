"""Where this machine's profile is kept, and what it is valid for: the machine, its GPU, and monde's version."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from hostcompute import env
from hostcompute.topology import cpu_name, default_cores
from monde.planning.machines import DESCRIBED
from monde.planning.profile import HardwareProfile, MachineIdentity


def this_machine() -> MachineIdentity:
    """num_cores is that of the cores that host kernels get; MONDE_NUM_THREADS makes it another machine."""
    return MachineIdentity(
        name=platform.node(),
        cpu=cpu_name(),
        num_cores=len(default_cores()),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        library_version=_version(),
    )


def _version() -> str:
    try:
        return importlib.metadata.version("monde")
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return "not installed"


def path_of(machine: MachineIdentity) -> Path:
    """In the user's cache folder, a file of its own for every identity: home folders are shared between machines."""
    digest = hashlib.sha256(json.dumps(asdict(machine), sort_keys=True).encode()).hexdigest()
    return env.cache_home() / "monde" / f"profile-{digest[:16]}.json"


def load(machine: MachineIdentity) -> HardwareProfile | None:
    """None where nothing was measured. Errors: ValueError for a file that is damaged or of another version."""
    path = path_of(machine)
    return HardwareProfile.load(path, machine) if path.is_file() else None


def profile_of(machine: MachineIdentity) -> HardwareProfile:
    """What plans go by while a model runs: measured here, or else another machine's, whose name says so.

    Errors: as load.
    """
    measured = load(machine)
    return measured if measured is not None and measured.gpu is not None else DESCRIBED["h200"]


def check_writable(machine: MachineIdentity) -> None:
    """Before a measurement that is to be saved. Errors: OSError with the remedy where it could not be."""
    folder = path_of(machine).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # root may write everywhere, except where nobody can
            pass
    except OSError as error:
        raise OSError(
            f"the profile cannot be stored in {folder} ({error.strerror}); make that folder writable, or set "
            "XDG_CACHE_HOME to one that is"
        ) from error


def save(profile: HardwareProfile) -> Path:
    """Errors: as check_writable."""
    check_writable(profile.machine)
    path = path_of(profile.machine)
    part = path.with_suffix(".part")  # whoever reads meanwhile sees the old profile or the new one
    profile.save(part)
    part.replace(path)
    return path
