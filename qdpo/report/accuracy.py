"""Writes an accuracy with the number of pairs that it was counted over: a share alone says more than it knows."""


def accuracy_text(share: float, pairs: int | None) -> str:
    """`0.917 (n=24)`; three decimals, since no share of under a thousand pairs has more to tell."""
    return f"{share:.3f}" + ("" if pairs is None else f" (n={pairs:,})")
