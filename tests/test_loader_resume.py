"""A loader resumes exactly: from a state, after an interruption, with another number of ranks or batch size."""

import json
import os

import pytest
from loaders import N, facts, loader
from mapimages import smooth_image, still_recipe, write_set

from pipeline import ShardSet, recipes
from pipeline.recipes import Recipe


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return ShardSet(write_set(tmp_path_factory.mktemp("set"), N, 3))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet(write_set(tmp_path_factory.mktemp("photos"), 12, 2, make=smooth_image, form="JPEG"))


def test_resume_at_every_step(shards: ShardSet) -> None:
    """At each step of two epochs: the state goes through JSON into new loaders, twice in a row; nothing changes."""
    source = loader(shards, 8)
    states = [source.state_dict()]
    batches = []
    for _ in range(2):
        for batch in source:
            batches.append(batch)
            states.append(source.state_dict())
    assert [(s["epoch"], s["position"]) for s in states] == [(0, 0), (0, 8), (0, 16), (1, 0), (1, 8), (1, 16), (2, 0)]
    for k, state in enumerate(states[:-1]):
        resumed = loader(shards, 8)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.state_dict() == state
        again = loader(shards, 8)
        again.load_state_dict(resumed.state_dict())
        rest = list(again)
        assert again.state_dict() == states[3 if k < 3 else 6]
        assert facts(rest) == facts(batches[k : 3 if k < 3 else 6])
        if k == 4:  # ... and once more, from the middle of what was resumed
            resumed.load_state_dict(states[4])
            next(iter(resumed))
            third = loader(shards, 8)
            third.load_state_dict(resumed.state_dict())
            assert facts(third) == facts(batches[5:6])


def test_resume_with_other_ranks_batches_and_threads(shards: ShardSet) -> None:
    source = loader(shards, 4)
    wanted = dict(facts(source))
    for steps in range(6):
        source = loader(shards, 4)
        for _ in range(steps):
            next(iter(source))
        state = source.state_dict()
        after = {i: h for (place, i), h in wanted.items() if place >= 4 * steps}
        for world, batch_size in ((1, 2), (2, 2), (4, 1), (2, 1), (8, 1)):
            if steps % 2 and world == 8:
                continue  # half a batch would be left over
            seen: dict[int, str] = {}
            for rank in range(world):
                part = loader(shards, batch_size, rank=rank, world_size=world, num_threads=2)
                part.load_state_dict(state)
                seen.update({i: h for (_, i), h in facts(part).items()})
                assert part.epoch == 1
            assert seen == after


def test_an_epoch_without_a_batch_left_is_over(shards: ShardSet) -> None:
    source = loader(shards, 4)
    for _ in range(5):
        next(iter(source))
    resumed = loader(shards, 8)  # four samples are left, half a batch
    resumed.load_state_dict(source.state_dict())
    assert resumed.epoch == 1
    assert len(list(resumed)) == 3


def test_a_broken_off_loop_goes_on(shards: ShardSet) -> None:
    wanted = facts(loader(shards))
    source = loader(shards)
    batches = []
    while source.epoch == 0:
        for batch in source:
            batches.append(batch)
            if len(batches) % 2:
                break
    assert facts(batches) == wanted
    source.close()
    assert [len(facts([b])) for b in source] == [4] * 6


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("seed", {"seed": 6}),
        (r"recipe\.cuts\[0\]\.scale", {"recipe": still_recipe(size=32, queries=2).cuts}),
        ("order", {"order": "block"}),
        ("order", {"shuffle": False}),
        (r"recipe\.name", {"recipe": recipes.loca("paper")}),
    ],
)
def test_a_state_of_something_else_is_refused(shards: ShardSet, field: str, change: dict) -> None:
    state = loader(shards).state_dict()
    if isinstance(change.get("recipe"), tuple):
        wider = [recipes.Cut(**{**vars(cut), "scale": (0.5, 1.0)}) for cut in change["recipe"]]
        change = {"recipe": Recipe("still", "paper", tuple(wider))}
    with pytest.raises(ValueError, match=field):
        loader(shards, **change).load_state_dict(state)


def test_a_state_of_another_set_or_none_is_refused(shards: ShardSet, photos: ShardSet) -> None:
    state = loader(shards).state_dict()
    with pytest.raises(ValueError, match="shards"):
        loader(photos).load_state_dict(state)
    with pytest.raises(ValueError, match="'seed'"):
        loader(shards).load_state_dict({"version": 1})
    with pytest.raises(ValueError, match="not taken from a Loader"):
        loader(shards).load_state_dict(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="position 99"):
        loader(shards).load_state_dict({**state, "position": 99})
    with pytest.raises(ValueError, match="epoch 1180591620717411303424"):
        loader(shards).load_state_dict({**state, "epoch": 2**70})


def test_two_iterators_share_one_epoch(shards: ShardSet) -> None:
    source, wanted = loader(shards), facts(loader(shards))
    one, other = iter(source), iter(source)
    assert facts(next(one if k % 2 else other) for k in range(6)) == wanted
    assert next(one, None) is next(other, None) is None


def test_a_state_may_be_loaded_inside_the_loop(shards: ShardSet) -> None:
    source, seen, states = loader(shards), [], []
    for batch in source:
        seen.append(batch)
        states.append(source.state_dict())
        if len(seen) == 4:
            source.load_state_dict(states[1])
    wanted = list(facts(loader(shards)).values())
    assert list(facts(seen).values()) == wanted[:16] + wanted[8:]


def test_iterating_goes_on_after_an_interruption(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the worst moment, a result just taken out of DALI: the next batch is still the right one."""
    wanted = facts(loader(shards))
    source = loader(shards)
    batches = [next(iter(source)), next(iter(source))]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(source, "_batch", interrupt)
        next(iter(source))
    assert facts([*batches, *source]) == wanted
