"""The loss of a group and its gradient in plain Python."""

import math


def chances(scores: dict[int, float], temperature: float) -> dict[int, float]:
    weights = {place: math.exp(score / temperature) for place, score in scores.items()}
    return {place: weight / sum(weights.values()) for place, weight in weights.items()}


def reference_group(scores, labels, target, teacher, temperature=1.0, weight=0.0, teacher_temperature=1.0):
    """Loss of one group and its slope by each score, in plain Python; None is a teacher's score that is unknown."""
    competing = [i for i in range(len(scores)) if i == target or labels[i] < labels[target]]
    known = [i for i in competing if teacher[i] is not None]
    weight = weight if len(known) > 1 else 0.0
    won = chances({i: scores[i] for i in competing}, temperature)
    held = chances({i: scores[i] for i in known}, temperature)
    wanted = chances({i: teacher[i] for i in known}, teacher_temperature)
    loss = -(1 - weight) * math.log(won[target])
    slopes = [0.0] * len(scores)
    for i in competing:
        slopes[i] += (1 - weight) * (won[i] - (1.0 if i == target else 0.0)) / temperature
    for i in known if weight else []:
        loss += weight * wanted[i] * math.log(wanted[i] / held[i])
        slopes[i] += weight * (held[i] - wanted[i]) / temperature
    return loss, slopes
