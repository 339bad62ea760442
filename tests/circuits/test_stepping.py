"""Runs of blocks that are interrupted anywhere go on, with values in memory or in a folder."""

import os
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fheconv
from fheconv.circuits.ciphertext import Ciphertext
from fheconv.circuits.kept import InFolder, InMemory, name_of
from fheconv.circuits.stepping import missing, run_blocks
from fheconv.lowering.blocks import Block


@st.composite
def plans(draw):
    """Blocks each of which reads the image or earlier blocks, and all of which the last depends on."""
    count = draw(st.integers(1, 6))
    blocks = []
    for number in range(1, count + 1):
        reads = draw(st.sets(st.integers(0, number - 1), min_size=1))
        if number == count:
            unread = set(range(1, count)) - {n for block in blocks for n in block.reads}
            reads |= unread
        blocks.append(Block(stage=number, number=number, reads=tuple(sorted(reads))))
    return blocks


def ciphertext(*values):
    return Ciphertext(
        kind="input", fingerprint="ab", key_id="cd", images=len(values), batched=True, values=values
    )


def joined(block, values):
    """What stands for a block here: its name and what it read."""
    return f"{block.number}(".encode() + b",".join(values) + b")"


@given(plans(), st.lists(st.binary(max_size=3), max_size=3), st.data())
@pytest.mark.parametrize("place", [InMemory, lambda: InFolder(Path(tempfile.mkdtemp()) / "kept")])
def test_interrupted_runs_go_on_and_run_no_block_twice(place, blocks, images, data):
    kept, encrypted = place(), ciphertext(*images)
    expected = run_blocks(blocks, encrypted, joined, InMemory())
    ran, stops = [], set(data.draw(st.lists(st.integers(0, 20), max_size=3)))

    def stopping(block, values):
        if len(ran) in stops:
            stops.remove(len(ran))
            raise KeyboardInterrupt
        ran.append(block)
        return joined(block, values)

    while True:
        try:
            result = run_blocks(blocks, encrypted, stopping, kept)
            break
        except KeyboardInterrupt:
            continue
    assert result == expected
    assert result.answers(encrypted)
    assert len(ran) == len(blocks) * len(set(images))
    for at in range(len(images)):
        assert kept.numbers(name_of(encrypted, at)) == set()
    assert isinstance(kept, InMemory) or not kept.path.exists()


@given(plans(), st.data())
def test_what_must_run_is_what_the_last_block_still_needs(blocks, data):
    held = data.draw(st.sets(st.integers(1, len(blocks))))
    needed, asked = set(), [len(blocks)]
    while asked:
        number = asked.pop()
        if number and number not in held | needed:
            needed.add(number)
            asked += blocks[number - 1].reads
    assert [block.number for block in missing(blocks, held)] == sorted(needed)


def test_images_of_other_circuits_and_keys_have_other_names():
    one = ciphertext(b"image")
    others = [Ciphertext(**{**vars(one), **change}) for change in ({"key_id": "x"}, {"fingerprint": "x"})]
    assert len({name_of(each, 0) for each in (one, ciphertext(b"other"), *others)}) == 4


@pytest.fixture
def kept(tmp_path):
    folder = InFolder(tmp_path / "kept")
    with folder.opened():
        folder.put("image", 1, b"value")
        folder.put("image", 2, b"other")
        yield folder


def test_files_are_their_owners_alone(kept):
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in kept.path.iterdir()] == [0o600] * 2


def test_values_that_are_damaged_or_in_another_place_are_not_there(kept):
    first, second = sorted(kept.path.iterdir())
    assert kept.numbers("image") == {1, 2}
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert kept.numbers("image") == {1}
    second.write_bytes(whole[:-1])
    assert kept.get("image", 2) is None
    second.write_bytes(whole[:-40] + b"x" + whole[-39:])
    assert kept.get("image", 2) is None
    second.write_bytes(whole)
    assert kept.get("image", 2) == b"other"
    assert kept.get("other", 1) is None


def test_two_runs_do_not_share_a_folder(kept):
    with pytest.raises(fheconv.ArtifactError, match="Another run"), InFolder(kept.path).opened():
        pass


def test_a_folder_that_leads_elsewhere_is_refused(kept, tmp_path):
    os.symlink(kept.path, tmp_path / "link")
    with pytest.raises(fheconv.ArtifactError, match="no folder"), InFolder(tmp_path / "link").opened():
        pass


def test_a_value_that_is_lost_amid_a_run_is_an_error():
    class Forgetting(InMemory):
        def get(self, image, number):
            return None

    blocks = [Block(stage=0, number=1, reads=(0,)), Block(stage=1, number=2, reads=(1,))]
    with pytest.raises(fheconv.ArtifactError, match="gone or altered"):
        run_blocks(blocks, ciphertext(b"image"), joined, Forgetting())
