"""A share of documents is held out, whole, and the same one whatever stands around them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lce_trainer.synthesis.held_out import hold_out

NAMES = st.lists(st.text(max_size=3), min_size=1, max_size=60)


@given(NAMES, st.sampled_from([0.1, 0.3, 0.5]), st.integers(0, 5))
def test_all_rows_of_a_name_are_held_out_or_none_in_any_order(names, share, seed):
    held = hold_out(names, share, seed)
    chosen = {name for name, inside in zip(names, held, strict=True) if inside}
    assert held.tolist() == [name in chosen for name in names]
    assert len(chosen) == int(np.ceil(len(set(names)) * share))
    assert hold_out(names[::-1], share, seed).tolist() == held[::-1].tolist()


def test_a_larger_share_holds_out_those_of_a_smaller_one_and_a_seed_draws_others():
    names = [f"d{i}" for i in range(200)]
    small, large, other = (hold_out(names, *how) for how in ((0.1, 1), (0.2, 1), (0.1, 2)))
    assert small.sum() == 20 and large.sum() == 40 and (large | ~small).all()
    assert (small & other).sum() < 10
    assert hold_out(names, 0.1, 1, least=50).sum() == 50 and hold_out(names[:30], 0.1, 1, least=50).all()
