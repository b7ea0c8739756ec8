"""The codecs of sliced models: what each stores at a site, and the folder that this makes."""

from freebits.packed.sites.bitsback import THRESHOLD, BitsBack
from freebits.packed.sites.canonical import Canonical
from freebits.packed.sites.folder import PackedCheckpoint, pack_sites

__all__ = ["THRESHOLD", "BitsBack", "Canonical", "PackedCheckpoint", "pack_sites"]
