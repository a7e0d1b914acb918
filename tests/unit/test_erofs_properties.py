"""Random trees, in any order, through writer and reader."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.images import Item, fsck, open_image, write_image
from tests.support.random_trees import expected_nodes, trees
from tests.support.trees import Scope, assert_same, scan_image

_SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@given(trees(), st.sampled_from([0, 1_700_000_000]), st.sampled_from([7, 4096, 65536]))
@settings(_SETTINGS, max_examples=120)
def test_reader_finds_what_was_written(items: list[Item], epoch: int, room: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "image")
        summary = write_image(image, items, epoch=epoch, room=room)
        assert summary.size == image.stat().st_size
        assert summary.names == len(items)
        with open_image(image) as reader:
            found = scan_image(reader)
            assert_same(expected_nodes(items), found, Scope(directory_links=True))
            assert reader.inode_count == summary.inodes == sum(item[0].link_to is None for item in items)
            for path, node in found.items():
                inode = reader.resolve(path, follow=False)
                assert (inode.mode, inode.size) == (node.mode, inode.size)
                if stat.S_ISDIR(node.mode):
                    assert reader.lookup(inode, b"n" * 254) is None


@given(trees(max_nodes=40))
@settings(_SETTINGS, max_examples=25)
def test_fsck_accepts_what_was_written(items: list[Item]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "image")
        write_image(image, items)
        fsck(image)


@given(trees(), st.randoms(use_true_random=False))
@settings(_SETTINGS, max_examples=40)
def test_metadata_depends_on_the_tree_and_not_on_the_order(items: list[Item], random: object) -> None:
    """Only contents, and which of an inode's names comes first, follow the order of adding."""
    items = [item for item in items if item[0].link_to is None and not item[0].size and len(item[0].target) < 1000]
    shuffled = list(items)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as directory:
        one, two = Path(directory, "one"), Path(directory, "two")
        write_image(one, items)
        write_image(two, shuffled)
        assert one.read_bytes() == two.read_bytes()
