import lce_trainer
from lce_trainer import errors


def test_every_error_is_a_public_name_and_caught_by_one_base():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 5
    for kind in kinds:
        assert kind.__name__ in lce_trainer.__all__ and getattr(lce_trainer, kind.__name__) is kind
        assert issubclass(kind, lce_trainer.LCETrainerError)


def test_a_message_names_the_first_ids_and_counts_the_rest():
    assert errors.format_ids(["a"]) == "'a'"
    assert errors.format_ids([str(i) for i in range(10)]) == "'0', '1', '2', '3', '4', '5', '6', '7' and 2 more"
    assert errors.format_ids(["x" * 200]) == repr("x" * 80)
