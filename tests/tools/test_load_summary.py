"""What the load test tells, also of a federation that did not get to its end."""

from tools.load_summary import KINDS, Outcome, growth, table


def outcome(rounds: int) -> Outcome:
    """Two sites of which both answered in each of so many rounds of ten."""
    process = {"mb": 100.0, "files": 9, "threads": 4}
    samples = [
        {"round": number + 1, "database_mb": 0.5, **dict.fromkeys(KINDS, process)}
        for number in range(rounds)
    ]
    seconds = [4.0 + number for number in range(rounds)]
    return Outcome(2, 10, seconds=seconds, counted=2 * rounds, samples=samples)


def test_an_interrupted_federation_says_what_it_reached_and_is_not_good() -> None:
    one = outcome(3)
    assert "| 2 | 3 of 10 | 5.0 (4.0 to 6.0) | 0 | 0 |" in table([one])
    assert "not compared" in table([one])
    assert not one.good


def test_only_the_bytes_of_the_replay_and_every_answer_are_good() -> None:
    one = outcome(10)
    one.bytes_same = True
    assert one.good
    one.counted -= 1
    assert one.missing == 1
    assert not one.good
    one.counted, one.mixed = 19, 1
    assert (one.missing, one.good) == (0, False)


def test_growth_shows_the_first_and_the_last_rounds_whatever_their_number() -> None:
    for rounds in (2, 3, 4, 6, 10, 50):
        told = growth(outcome(rounds))
        assert "round 1" in told or "rounds 1 to" in told
        assert f"to {rounds} |" in told or f"round {rounds} |" in told
        assert told.count("| SuperNodes | 100; 9; 4 |") == 1
    assert "too few" in growth(outcome(1))
    assert "too few" in growth(outcome(0))
