import numpy as np

from lce_trainer.model.pairs import EncodedPairs, TokenLists, slice_indices


def test_pieces_of_an_array_are_gathered_in_their_order_empty_ones_too():
    assert slice_indices(np.array([7, 0, 3, 3]), np.array([2, 3, 0, 1])).tolist() == [7, 8, 0, 1, 2, 3]
    assert slice_indices(np.zeros(0, dtype=int), np.zeros(0, dtype=int)).tolist() == []
    assert slice_indices(np.array([5]), np.array([0])).tolist() == []


def test_texts_taken_are_those_of_the_lists():
    lists = [[1, 2], [], [3], [4, 5, 6]]
    texts = TokenLists.of(lists)
    rows = [3, 1, 0, 3]
    taken = texts.take(rows)
    assert np.split(taken.ids, taken.starts[1:])[0].tolist() == [4, 5, 6]
    assert taken.ids.tolist() == [number for row in rows for number in lists[row]]
    assert taken.counts.tolist() == [3, 0, 2, 3] and taken.starts.tolist() == [0, 3, 3, 5]


def test_pairs_taken_keep_each_of_their_inputs():
    encoded = EncodedPairs.of({"input_ids": [[1, 2], [3], [4, 5, 6]], "token_type_ids": [[0, 1], [1], [0, 0, 1]]})
    taken = encoded.take(np.array([2, 0]))
    assert taken.lengths.tolist() == [3, 2]
    assert taken.inputs["input_ids"].tolist() == [4, 5, 6, 1, 2]
    assert taken.inputs["token_type_ids"].tolist() == [0, 0, 1, 0, 1]
