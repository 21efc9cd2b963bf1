"""What `parity.py` checks: quantities, tolerances, and why each is as it is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One quantity that must stay small.

    Attributes:
        name: as shown.
        value: from what the path and the plain path found.
        float32: tolerance of paths in float32; None: from `limit`.
        bfloat16: likewise; None without `limit`: not checked.
        why: one sentence.
        limit: tolerance from what the plain path found.
        of_plain: whether it says something of the plain path too.
    """

    name: str
    value: Callable[[dict, dict], float]
    float32: float | None
    bfloat16: float | None
    why: str
    limit: Callable[[dict], float] | None = None
    of_plain: bool = False


def loss_gap(path: dict, plain: dict) -> float:
    """Return the largest difference of two SFT curves, as a share of the loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(path["sft"], plain["sft"], strict=True))


def late_mean(curve: list[float]) -> float:
    """Return the mean of a curve's last fifth, at least five points."""
    return statistics.mean(curve[-max(len(curve) // 5, 5):])


def late_gap(name: str) -> Callable[[dict, dict], float]:
    """Return the difference of two curves' last fifths."""
    return lambda path, plain: abs(late_mean(path[name]) - late_mean(plain[name]))


def late_limit(name: str) -> Callable[[dict], float]:
    """Return four standard errors of that difference, from the scatter between iterations."""
    def limit(plain: dict) -> float:
        late = plain[name][-max(len(plain[name]) // 5, 5):]
        return 4 * statistics.stdev(late) * math.sqrt(2 / len(late))
    return limit


def own(name: str) -> Callable[[dict, dict], float]:
    """Return a number that the path found itself."""
    return lambda path, plain: path[name]


CHECKS = [
    Check("log-probability, largest difference, nats", own("logprob_max"), 1e-4, 0.25,
          "float32 rounds at 6e-8 of logits near 10, and sums of 1000 terms may lose two digits; "
          "bfloat16 rounds at 2e-3 of each of them."),
    Check("log-probability, mean difference, nats", own("logprob_mean"), 1e-5, 0.02,
          "Rounding has no direction, so the mean is an order below the largest."),
    Check("KL to the plain path, nats per token", own("kl_mean"), 1e-9, 1e-3,
          "It is half the mean squared difference: (1e-5)^2 and (0.04)^2, times some ten."),
    Check("score, largest difference", own("score_max"), 1e-4, 0.1,
          "As for log-probabilities; the scores of one model differ by about 1."),
    Check("decode's log-probabilities, largest difference", own("decode_max"), 1e-4, 0.25,
          "They are of the same tokens, so the same tolerance holds for the cache and the graph.",
          of_plain=True),
    Check("decode's log-probabilities, mean difference", own("decode_mean"), 1e-5, 0.02,
          "As above.", of_plain=True),
    Check("share of responses that differ from the plain loop's", own("decode_other_rows"), 0.02,
          None, "Rounding moves a token's interval by 1e-7, so that few of a million picks change; "
          "not checked in bfloat16, where it moves by 1e-3 and most responses differ somewhere.",
          of_plain=True),
    Check("|ratio - 1| on the first minibatch, largest", own("first_ratio_error"), 1e-3, 0.1,
          "Policy and old policy are the same weights; half the clip range of 0.2 must be left "
          "for learning, and float32 has room to spare.", of_plain=True),
    Check("SFT loss, largest difference of the curves, relative", loss_gap, 5e-3, 0.02,
          "Adam divides by the gradient's size, so rounding in small gradients moves weights by up "
          "to a learning rate; it does not add up, as both descend the same loss."),
    Check("PPO score, late mean", late_gap("score"), None, None,
          "Once one token is another, samples are independent: four standard errors of a "
          "difference of two means.", late_limit("score")),
    Check("PPO KL to the reference, late mean", late_gap("kl"), None, None,
          "As above.", late_limit("kl")),
]


def judge(found: dict[str, dict], plain_path: str) -> list[dict]:
    """Compare what each path found with the plain path.

    Args:
        found: per path the result of `run_path`, or `error`, or `skipped`.
        plain_path: its name.

    Returns:
        Per check `path`, `check`, `value`, `tolerance`, `why` and `result`: PASS, FAIL or skipped.
        The plain path itself is checked where it says something of its own.
    """
    rows, plain = [], found[plain_path]
    for path, result in found.items():
        if "skipped" in result:
            rows.append({"path": path, "check": "all", "result": "skipped",
                         "why": result["skipped"]})
            continue
        if "error" in result or "error" in plain:
            last = result.get("error", "the plain path failed").strip().splitlines()[-1]
            rows.append({"path": path, "check": "runs to the end", "result": "FAIL", "why": last})
            continue
        for check in CHECKS:
            limit = check.limit(plain) if check.limit else (
                check.bfloat16 if "bfloat16" in path else check.float32)
            if limit is None or (path == plain_path and not check.of_plain):
                continue
            value = check.value(result, plain)
            rows.append({"path": path, "check": check.name, "value": value, "tolerance": limit,
                         "why": check.why, "result": "PASS" if value <= limit else "FAIL"})
    return rows


def show_check(row: dict) -> str:
    """Return a check as a line of text."""
    numbers = (f"{row['value']:.2g}, at most {row['tolerance']:.2g}" if "value" in row
               else row["why"])
    return f"{row['result']:8}{row['path']}: {row['check']}: {numbers}"


def write_table(checks: list[dict]) -> str:
    """Return the checks as Markdown."""
    lines = ["| path | check | value | tolerance | result |", "|---|---|---|---|---|"]
    for row in checks:
        if "value" in row:
            middle = f"{row['value']:.2g} | {row['tolerance']:.2g}"
        else:
            middle = f"{row['why'].replace('|', '/')[:120]} | "
        lines.append(f"| {row['path']} | {row['check'].replace('|', '&#124;')} | {middle} | "
                     f"{row['result']} |")
    reasons = {row["check"]: row["why"] for row in checks if "value" in row}
    return "\n".join([*lines, "", "Why these tolerances:", "",
                      *(f"- {name}: {why}" for name, why in reasons.items())])
