"""Where linear algebra runs."""

import torch

from freebits.errors import UsageError


def device_of(name: str, *, float64: bool = False) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: there is none on this machine, or it has no float64 where that is needed.
    """
    try:
        device = torch.ones(1, device=name).cpu().new_empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        finding = str(error).strip().partition("\n")[0]
        raise UsageError(f"device {name!r} cannot be used here ({finding})") from None
    if float64 and device.type == "mps":
        raise UsageError("device 'mps' has no float64, in which this is computed: leave out --device")
    return device
