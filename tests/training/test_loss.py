import math

import pytest
import torch

from helpers.reference_loss import reference_group
from lce_trainer.training.loss import distillation_loss, group_losses, lce_loss


def grid(*rows: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as a padded table, the padding NaN, and its mask."""
    width = max(map(len, rows))
    table = torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in rows], dtype=torch.float64)
    return table, ~table.isnan()


def reference_lce(rows, labels, target, temperature):
    """Per group in plain Python: the target against every passage of a strictly lower label."""
    total = 0.0
    for row, grades, t in zip(rows, labels, target, strict=True):
        competing = [s / temperature for s, g in zip(row, grades, strict=True) if g < grades[t]]
        positive = row[t] / temperature
        total += math.log(sum(math.exp(s) for s in [positive, *competing])) - positive
    return total


def test_literal_values():
    scores, mask = grid([0.0, 0.0, 0.0, 0.0], [2.0, 1.0])
    loss = lce_loss(scores, torch.tensor([0, 0]), mask)
    assert loss.item() == pytest.approx(math.log(4) + math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_equals_a_reference_for_ragged_several_positive_and_graded_groups(temperature):
    generator = torch.Generator().manual_seed(0)
    labels = [[1, 0, 0, 0, 0], [1, 1, 0], [3, 2, 2, 1, 0, 0, 3], [2, 0]]
    target = [0, 1, 1, 0]
    rows = [torch.randn(len(row), generator=generator, dtype=torch.float64).mul(3).tolist() for row in labels]
    scores, _ = grid(*rows)
    grades, real = grid(*[[float(g) for g in row] for row in labels])
    columns = torch.tensor(target)
    mask = real & (grades < grades.gather(1, columns[:, None]))
    mask = mask.scatter(1, columns[:, None], True)
    scores.requires_grad_()
    loss = lce_loss(scores, columns, mask, temperature)
    assert loss.item() == pytest.approx(reference_lce(rows, labels, target, temperature), abs=1e-12)
    loss.backward()
    step = 1e-6
    for i, row in enumerate(rows):
        for j in range(len(row)):
            up, down = ([list(r) for r in rows] for _ in range(2))
            up[i][j] += step
            down[i][j] -= step
            slope = reference_lce(up, labels, target, temperature) - reference_lce(down, labels, target, temperature)
            assert scores.grad[i, j].item() == pytest.approx(slope / (2 * step), abs=1e-7)


@pytest.mark.parametrize("settings", [(0.3, 0.4, 2.5), (2.0, 0.75, 0.2), (0.7, 1.0, 1.5), (0.5, 0.0, 3.0)], ids=str)
def test_losses_of_groups_and_their_gradients_equal_a_reference_in_plain_python(settings):
    """Ragged, with several positives, graded; the teacher knows all, some, not the positive, one, or none of them."""
    generator = torch.Generator().manual_seed(0)
    labels = [[1, 0, 0, 0, 0], [1, 1, 0], [3, 2, 2, 1, 0, 0, 3], [0, 2, 0], [2, 1, 0, 0], [1, 0], [1, 1, 0, 0]]
    target = [0, 1, 1, 1, 0, 0, 0]
    rows = [torch.randn(len(row), generator=generator, dtype=torch.float64).mul(3).tolist() for row in labels]
    told = [torch.rand(len(row), generator=generator, dtype=torch.float64).mul(4).tolist() for row in labels]
    told[1][0] = told[2][3] = told[2][5] = told[3][1] = None
    told[4] = [None] * 4
    told[6][1:] = [None, 2.0, None]
    scores, real = grid(*rows)
    teacher, _ = grid(*[[math.nan if score is None else score for score in row] for row in told])
    grades, _ = grid(*[[float(grade) for grade in row] for row in labels])
    columns = torch.tensor(target)
    mask = (real & (grades < grades.gather(1, columns[:, None]))).scatter(1, columns[:, None], True)
    losses = group_losses(scores.requires_grad_(), columns, mask, teacher, *settings)
    (losses * torch.arange(1, 8)).sum().backward()  # so that no two groups weigh the same
    for i, group in enumerate(zip(rows, labels, target, told, strict=True)):
        loss, slopes = reference_group(*group, *settings)
        assert losses[i].item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
        assert scores.grad[i, : len(slopes)].tolist() == pytest.approx([(i + 1) * s for s in slopes], abs=1e-12)
        assert (scores.grad[i, len(slopes) :] == 0).all()


def test_padding_never_reaches_the_gradient():
    scores, mask = grid([1.0, 2.0, 3.0], [1.0, 0.0])
    scores.requires_grad_()
    lce_loss(scores, torch.tensor([0, 0]), mask).backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[1, 2] == 0


def test_a_group_loss_ignores_its_neighbours():
    scores, mask = grid([1.0, -1.0, 0.5], [4.0, 3.0])
    together = lce_loss(scores, torch.tensor([2, 0]), mask, reduction="none")
    alone = lce_loss(scores[1:, :2], torch.tensor([0]), mask[1:, :2])
    torch.testing.assert_close(together[1], alone)
    torch.testing.assert_close(together.sum(), lce_loss(scores, torch.tensor([2, 0]), mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_are_lost_over_in_float32(dtype):
    scores = torch.tensor([[8.0, 0.5, 0.25]], dtype=dtype)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = lce_loss(scores, torch.tensor([0]), mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, lce_loss(scores.float(), torch.tensor([0]), mask))
    assert lce_loss(scores.double(), torch.tensor([0]), mask).dtype == torch.float64
    assert distillation_loss(scores, scores.float(), mask).dtype == torch.float32
    told = torch.tensor([[0.2, 0.9, 0.4]])
    losses = group_losses(scores, torch.tensor([0]), mask, told, 0.7, 0.5, 0.3)
    assert torch.equal(losses, group_losses(scores.float(), torch.tensor([0]), mask, told, 0.7, 0.5, 0.3))


def test_no_groups_have_no_loss():
    assert lce_loss(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4, dtype=torch.bool)) == 0


def test_distillation_equals_the_divergence_written_out():
    scores, mask = grid([0.3, -1.0, 2.0], [0.5, 0.1])
    teacher, _ = grid([0.9, 0.2, 0.4], [0.1, 0.8])
    expected = 0.0
    for row, told in (([0.3, -1.0, 2.0], [0.9, 0.2, 0.4]), ([0.5, 0.1], [0.1, 0.8])):
        p = [math.exp(t / 0.1) for t in told]
        q = [math.exp(s) for s in row]
        expected += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    assert distillation_loss(scores, teacher, mask, 0.1).item() == pytest.approx(expected)


def test_a_student_that_equals_its_teacher_up_to_a_shift_has_nothing_to_learn():
    scores, mask = grid([0.3, -1.0, 2.0], [0.5, 0.1])
    assert distillation_loss(scores + 7, scores, mask).item() == pytest.approx(0, abs=1e-12)


def test_a_group_without_a_teacher_has_no_loss_and_a_finite_gradient():
    scores = torch.tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[math.nan, math.nan], [0.9, 0.1]])
    losses = distillation_loss(scores, teacher, ~teacher.isnan(), reduction="none")
    losses.sum().backward()
    assert losses[0] == 0 and losses[1] > 0
    assert (scores.grad[0] == 0).all() and scores.grad.isfinite().all()
