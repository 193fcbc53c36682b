"""Weights of waiters, and the order in which they are released."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serve.core.effects import Answer
from serve.core.events import Priority, Requester
from serve.core.shares import positions, release_order, weights
from serve.core.state import Waiter
from tests.support.fleets import a_model, begin

requesters = st.builds(
    Requester, st.sampled_from(["", "k1", "k2", "k3"]), st.sampled_from(["", "u"]), st.sampled_from(Priority)
)
drafts = st.lists(st.tuples(st.integers(0, 20), requesters, st.booleans()), max_size=12)


def made(drafts: list[tuple[int, Requester, bool]]) -> list[Waiter]:
    return [
        Waiter(f"t{index}", "m", float(since), 99.0, unattended, requester)
        for index, (since, requester, unattended) in enumerate(drafts)
    ]


waiting = drafts.map(made)


def pressure(waiters: list[Waiter], now: float = 50.0) -> float:
    """A model's weight: each second of waiting by the waiter's weight."""
    return sum(weight * (now - waiter.since) for waiter, weight in zip(waiters, weights(waiters), strict=True))


def named(requester: Requester) -> bool:
    return bool(requester.key or requester.caller)


@given(waiting, st.randoms(use_true_random=False))
def test_weights_do_not_depend_on_the_order_in_which_waiters_are_given(waiters: list[Waiter], random: object) -> None:
    shuffled = list(waiters)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    before = sorted((one.since, repr(one.requester), w) for one, w in zip(waiters, weights(waiters), strict=True))
    after = sorted((one.since, repr(one.requester), w) for one, w in zip(shuffled, weights(shuffled), strict=True))
    assert after == before


@given(waiting, st.tuples(st.integers(0, 20), requesters, st.booleans()))
def test_another_waiter_never_lowers_a_models_weight(waiters: list[Waiter], draft: tuple[int, Requester, bool]) -> None:
    more = [*waiters, replace(made([draft])[0], ticket="new")]
    assert pressure(more) >= pressure(waiters) - 1e-9
    assert sum(weights(more)) > sum(weights(waiters))


@given(st.integers(1, 60), st.sampled_from(Priority))
def test_what_a_requester_adds_falls_with_each_request(count: int, priority: Priority) -> None:
    whole = [sum(weights(made([(i, Requester("k", "", priority), False) for i in range(n)]))) for n in range(count + 2)]
    added = [more - less for less, more in pairwise(whole)]
    assert all(0 < later < earlier for earlier, later in pairwise(added))
    strangers = made([(i, Requester(priority=priority), False) for i in range(count)])
    assert sum(weights(strangers)) >= whole[count] - 1e-9, "each unnamed one counts in full"


def test_five_hundred_requests_of_one_weigh_less_than_those_of_seven_users() -> None:
    greedy = made([(0, Requester("greedy"), False)] * 500)
    seven = made([(0, Requester(f"k{i}"), False) for i in range(7)])
    assert 6.0 < sum(weights(greedy)) < sum(weights(seven)) == 7.0
    batch = Requester("k", priority=Priority.BATCH)
    assert weights(made([(0, batch, False)])) == [0.2]


@given(waiting)
def test_the_order_of_release_is_fair(waiters: list[Waiter]) -> None:
    order = release_order(waiters)
    assert Counter(one.ticket for one in order) == Counter(one.ticket for one in waiters)
    groups = [(one.unattended, one.requester.priority is Priority.BATCH) for one in order]
    assert groups == sorted(groups), "clients that wait first, interactive before batch"
    attended = [one for one in order if not one.unattended and named(one.requester)]
    for index, one in enumerate(attended):
        earlier = attended[:index]
        mine = sum(other.requester == one.requester for other in earlier)
        assert all(other.since <= one.since for other in earlier if other.requester == one.requester), "oldest first"
        for requester, turns in Counter(other.requester for other in earlier).items():
            if requester.priority is one.requester.priority and not any(other.unattended for other in waiters):
                assert turns <= mine + 1, "in turns: none is two requests ahead of another that waits"
    assert positions(waiters) == {one.ticket: index for index, one in enumerate(order, 1)}


def test_the_oldest_of_each_go_before_the_second_of_any_and_interactive_before_batch() -> None:
    story = begin(a_model("a"))
    greedy, other = Requester("greedy"), Requester("other")
    first = [story.ask("a", requester=greedy, after=0.1) for _ in range(3)]
    slow = story.ask("a", requester=Requester("other", priority=Priority.BATCH), after=0.1)
    late = story.ask("a", requester=other, after=0.1)
    last = story.ask("a", requester=other, after=0.1)
    story.loaded("a")
    assert [answer.ticket for answer in story.said(Answer)] == [first[0], late, first[1], last, first[2], slow]
