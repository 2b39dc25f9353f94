import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lce_trainer.artifacts import digest
from lce_trainer.errors import ArtifactError
from lce_trainer.synthesis.journal import Journal, answer_all

KEYS = [f"key{number}" for number in range(7)]
BATCHES = [[4, 0], [2, 6, 1], [3, 5]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "answers.jsonl"


class Model:
    """Answers a batch with what tells whether it was cut differently; dies before a batch if told to."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.dies_at = dies_at

    def __call__(self, indices, each):
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append(list(indices))
        return [{"text": f"é{index}", "score": index / 3, "batch": list(indices)} for index in indices]


def run(path: Path, model: Model) -> list:
    with Journal(path) as journal:
        return answer_all(journal, KEYS, BATCHES, model, "asking")


def test_answers_come_in_the_order_of_the_keys(path):
    answers = run(path, Model())
    assert [answer["text"] for answer in answers] == [f"é{number}" for number in range(7)]
    assert answers[0]["batch"] == [4, 0]


@pytest.mark.parametrize("dies_at", [0, 1, 2])
def test_a_run_that_died_resumes_to_the_same_bytes_and_asks_nothing_twice(path, tmp_path, dies_at):
    whole = run(tmp_path / "whole.jsonl", Model())
    first, second = Model(dies_at), Model()
    with pytest.raises(KeyboardInterrupt):
        run(path, first)
    assert run(path, second) == whole
    assert first.asked + second.asked == BATCHES
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_run_asks_nothing(path):
    whole, again = run(path, Model()), Model()
    assert run(path, again) == whole
    assert again.asked == []


def test_a_journal_cut_anywhere_in_its_last_batch_resumes_to_the_same_bytes(path, caplog):
    whole = run(path, Model())
    complete = path.read_bytes()
    last = complete.rindex(b"\n", 0, -1) + 1
    for end in [last, last + 1, (last + len(complete)) // 2, len(complete) - 1]:
        path.write_bytes(complete[:end])
        again = Model()
        assert run(path, again) == whole
        assert again.asked == BATCHES[-1:]
        assert path.read_bytes() == complete
    assert caplog.text.count("cut off while written") == 3


@pytest.mark.parametrize("tail", [b"\0" * 50, b"\0" * 50 + b"\n", b'{"sha256": "0", "answers": {"a": 1}}\n', b"{}\n"])
def test_what_a_power_cut_leaves_at_the_end_is_dropped(path, tail):
    whole = run(path, Model())
    complete = path.read_bytes()
    path.write_bytes(complete + tail)
    again = Model()
    assert run(path, again) == whole
    assert again.asked == []
    assert path.read_bytes() == complete


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(path):
    run(path, Model())
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"batch": [2', b'"batch": [3')
    path.write_bytes(b"".join(lines))
    with pytest.raises(ArtifactError, match=r"answers\.jsonl:2 is damaged: delete that line"):
        Journal(path)
    path.write_bytes(lines[0] + lines[2])
    again = Model()
    run(path, again)
    assert again.asked == [BATCHES[1]]


def test_equal_keys_are_asked_once(path):
    model = Model()
    with Journal(path) as journal:
        answers = answer_all(journal, ["a", "b", "a", "b"], [[0, 1, 2], [3]], model, "asking")
    assert [len(batch) for batch in model.asked] == [2]
    assert answers[0] == answers[2] and answers[1] == answers[3]


def test_none_is_an_answer(path):
    with Journal(path) as journal:
        journal.append({"abstained": None})
    with Journal(path) as journal:
        assert "abstained" in journal and "unasked" not in journal
        assert journal.get("abstained") is None and len(journal) == 1


def test_an_answer_reads_the_same_before_and_after_a_restart(path):
    with Journal(path) as journal:
        journal.append({"a": (0.1 + 0.2, "\ud800\u2028\n", {"b": 1e-320})})
        fresh = journal.get("a")
    with Journal(path) as journal:
        assert journal.get("a") == fresh == [0.1 + 0.2, "\ud800\u2028\n", {"b": 1e-320}]


def test_a_wrong_number_of_answers_is_never_journalled(path):
    with Journal(path) as journal:
        with pytest.raises(ValueError):
            answer_all(journal, KEYS, BATCHES, lambda indices, each: ["one too few"] * (len(indices) - 1), "asking")
        assert len(journal) == 0


def test_a_second_process_is_told_to_wait(path):
    code = "import sys, pathlib; from lce_trainer.synthesis.journal import Journal; Journal(pathlib.Path(sys.argv[1]))"
    with Journal(path) as journal:
        journal.append({"a": 1})
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "is in use by another process: wait until it is done, or stop it" in other.stderr
    with Journal(path) as journal:
        assert journal.get("a") == 1


def test_a_full_disk_leaves_the_journal_as_it_was(path):
    resource = pytest.importorskip("resource")
    with Journal(path) as journal:
        journal.append({"a": "x" * 100})
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            with pytest.raises(ArtifactError, match="cannot write"):
                journal.append({"b": "x" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert path.read_bytes() == before
        journal.append({"c": 1})
    with Journal(path) as journal:
        assert len(journal) == 2


def test_a_process_killed_while_it_writes_loses_at_most_the_batch_in_flight(path):
    code = """
        import sys, pathlib
        from lce_trainer.synthesis.journal import Journal
        journal = Journal(pathlib.Path(sys.argv[1]))
        for batch in range(100000):
            journal.append({f"{batch}-{row}": "x" * 2000 for row in range(50)})
            print(batch, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    done = int([line for line in said if line.endswith("\n")][-1]) + 1
    with Journal(path) as journal:
        assert len(journal) // 50 in (done, done + 1) and len(journal) % 50 == 0
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


class Server:
    """Answers that come one by one, in another order than asked for; the connection breaks after so many."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.breaks_at = breaks_at

    def __call__(self, indices, each):
        answers = {}
        for place in reversed(range(len(indices))):
            if len(self.asked) == self.breaks_at:
                raise KeyboardInterrupt
            self.asked.append(indices[place])
            answers[place] = {"text": f"answer {indices[place]}"}
            each(place, answers[place])
        return [answers[place] for place in range(len(indices))]


@pytest.mark.parametrize("breaks_at", range(8))
def test_answers_that_come_one_by_one_are_kept_one_by_one(path, breaks_at):
    first, second = Server(breaks_at), Server()
    try:
        run(path, first)
    except KeyboardInterrupt:
        assert breaks_at < 7
    assert [answer["text"] for answer in run(path, second)] == [f"answer {number}" for number in range(7)]
    assert sorted(first.asked + second.asked) == list(range(7))
    assert all(len(json.loads(line)["answers"]) == 1 for line in path.read_bytes().splitlines())


def test_a_journal_of_an_earlier_version_is_read(path):
    path.parent.mkdir()
    answers = {"b": "é", "a": {"z": 1, "c": [None, 0.5]}}
    path.write_text(json.dumps({"sha256": digest(answers), "answers": answers}) + "\n")
    with Journal(path) as journal:
        assert journal["a"] == answers["a"] and journal["b"] == "é" and len(journal) == 2


ROWS = """
import pathlib, resource, sys, time
from lce_trainer.synthesis.journal import Journal
start = time.process_time()
with Journal(pathlib.Path(sys.argv[1])) as journal:
    print(len(journal), time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_million_answers_are_read_in_bounded_time_and_memory(path):
    path.parent.mkdir()
    with path.open("w") as file:
        for row in range(10**6):
            answers = {f"{row:016x}": f"what is the answer to the question number {row} of a million?"}
            file.write(json.dumps({"sha256": digest(answers), "answers": answers}) + "\n")
    done = subprocess.run([sys.executable, "-c", ROWS, str(path)], capture_output=True, text=True, check=True)
    rows, seconds, peak = map(float, done.stdout.split())
    assert rows == 10**6
    assert seconds < 60
    assert peak < path.stat().st_size * 2 + 5e8  # the answers once, and what the imports take
