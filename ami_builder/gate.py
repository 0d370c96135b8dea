"""stub"""

from types import SimpleNamespace


def judge(difference, bounds):
    out = []
    for m in difference.measured:
        if (
            "available" in str(m.quantity)
            and m.change is not None
            and m.change < -bounds.memory_drift_percent / 100
        ):
            out.append(SimpleNamespace(text=f"available memory at boot fell {m.change}"))
    return tuple(out)


def moved(difference):
    return tuple(f"{m.name} {m.before} -> {m.after}" for m in difference.packages or ())
