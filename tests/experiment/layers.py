"""Layers of defence against a VM that runs out of memory: their names. layers.sh sets them on the VM.

A case names its layers in one string: `image` (what the image has), `off` (none, not even the image's),
or names joined by `+`, such as `ttl+protect` (these and no others).
"""

from __future__ import annotations

import re

IMAGE, OFF, OOM_SCORE = "image", "off", "oom-score"
LAYERS = {
    "ttl": "what was used in the last second stays in memory: the kernel ends a process instead "
    "(`lru_gen/min_ttl_ms` 1000; `ttl-N` is N ms)",
    "protect": "`MemoryMin` for sshd, journald, networkd, logind, D-Bus, Docker, containerd: what each holds",
    "protect-all": "the same for each service and PID 1, and 32 MiB for logins",
    "low": "as `protect`, with `MemoryLow`",
    OOM_SCORE: "the kernel ends a process of Dask first (`oom_score_adj` 500)",
    "watermark": "the kernel frees memory earlier (`vm.watermark_scale_factor` 100)",
    "min-free": "the kernel keeps more memory free (`vm.min_free_kbytes` × 4)",
    "low-free": "the kernel keeps no more than 1/64 of the memory free (`vm.min_free_kbytes`)",
    "madvise": "huge pages only where a program asks for them",
    "never": "no huge pages",
    "zram": "compressed swap of 25 % of the memory, which containers can't use",
}
OOM_SCORE_ADJ = 500
_TTL = re.compile(r"ttl-[1-9][0-9]{0,5}")


def parse_layers(text: str) -> str:
    """Return the name of a set of layers in its canonical order; raises ValueError for an unknown layer."""
    if text in (IMAGE, OFF):
        return text
    wanted = text.split("+")
    for name in wanted:
        if name not in LAYERS and not _TTL.fullmatch(name):
            known = ", ".join((IMAGE, OFF, *LAYERS))
            raise ValueError(f"{name!r} is not a layer; known: {known}, ttl-MILLISECONDS, joined by +")
    order = [*LAYERS, *(name for name in wanted if name not in LAYERS)]
    return "+".join(sorted(dict.fromkeys(wanted), key=order.index))


def arguments(layers: str) -> list[str]:
    """Return the arguments of layers.sh: nothing for the image's own layers."""
    if layers == IMAGE:
        return []
    return [OFF, *(layers.split("+") if layers != OFF else ())]
