"""Layers as one tree without the kernel: what hides what, how it is listed, and layers by someone hostile."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from encfs.erofs.reader import ErofsReader
from encfs.erofs.structures import DIRENT
from encfs.erofs.walk import walk
from encfs.errors import FormatError, NotFoundError, UnsupportedError
from encfs.image import merged
from encfs.image.conventions import OPAQUE, kernel_xattrs
from encfs.image.layers import FilesTree, LayersTree
from encfs.image.merged import MergedTree
from encfs.image.stack import SHIFT, VolumeStack, open_readers
from tests.support.image_artifacts import directory, file, hard_link, link, make_stack, make_tree, whiteout
from tests.support.images import write_image
from tests.support.mounts import FileVolume


def paths(tree: MergedTree) -> list[bytes]:
    return [path for path, _ in walk(tree, tree.inode(tree.root))]


def read(tree: MergedTree, path: bytes) -> bytes:
    inode = tree.resolve(path)
    return tree.read(inode, 0, inode.size)


def names(tree: MergedTree, path: bytes) -> list[bytes]:
    return [entry.name for entry in tree.entries(tree.resolve(path))]


def test_upper_names_hide_lower_ones(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        [
            [directory(b"", mode=0o700), file(b"a", b"low"), file(b"d/a", b"low"), file(b"d/b", b"low")],
            [file(b"d/b", b"middle"), file(b"d/c", b"middle")],
            [directory(b"", mode=0o711), file(b"a", b"high"), directory(b"d", mode=0o750), file(b"d/c", b"high")],
        ],
    )
    assert paths(tree) == [b"a", b"d", b"d/a", b"d/b", b"d/c"]
    assert [read(tree, path) for path in (b"a", b"d/a", b"d/b", b"d/c")] == [b"high", b"low", b"middle", b"high"]
    assert stat.S_IMODE(tree.inode(tree.root).mode) == 0o711
    assert stat.S_IMODE(tree.resolve(b"d").mode) == 0o750
    assert tree.resolve(b"d").nlink == 1


def test_whiteouts_and_opaque_directories(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        [
            [
                file(b"gone", b"1"),
                file(b"d/gone", b"1"),
                file(b"d/stays", b"1"),
                file(b"o/hidden", b"1"),
                file(b"x/a", b""),
            ],
            [
                whiteout(b"gone"),
                whiteout(b"d/gone"),
                directory(b"o", opaque=True),
                file(b"o/new", b"2"),
                whiteout(b"x"),
            ],
            [file(b"d/new", b"3"), file(b"o/newer", b"3"), whiteout(b"nothing"), directory(b"x"), file(b"x/b", b"3")],
        ],
    )
    assert paths(tree) == [b"d", b"d/new", b"d/stays", b"o", b"o/new", b"o/newer", b"x", b"x/b"]
    for path in (b"gone", b"d/gone", b"o/hidden", b"nothing", b"x/a"):
        with pytest.raises(NotFoundError):
            tree.resolve(path)
    assert tree.xattrs(tree.resolve(b"o")) == {}


def test_an_opaque_root_hides_everything_below(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, [[file(b"a", b"")], [directory(b"", opaque=True), file(b"b", b"")]])
    assert paths(tree) == [b"b"]


def test_directories_and_other_things_replace_one_another(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        [
            [file(b"a/x", b""), file(b"b", b""), file(b"c/low", b"")],
            [file(b"a", b"file"), file(b"b/x", b""), link(b"c", b"a")],
            [file(b"c/high", b"")],
        ],
    )
    assert paths(tree) == [b"a", b"b", b"b/x", b"c", b"c/high"]
    assert read(tree, b"a") == b"file"


def test_hard_links_of_a_layer_are_one_inode(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path, [[file(b"one", b"low")], [file(b"one", b"x"), hard_link(b"two", b"one"), file(b"d/f", b"")]]
    )
    assert tree.resolve(b"one") == tree.resolve(b"two")
    assert tree.resolve(b"one").nlink == 2


def test_symbolic_links_lead_through_the_merged_tree(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, [[file(b"d/f", b"low")], [link(b"to", b"/d"), file(b"d/g", b"high")]])
    assert read(tree, b"to/f") == b"low"
    assert read(tree, b"to/../d/g") == b"high"


@pytest.mark.parametrize("layers", [1, 2])
def test_listings_go_on_from_every_place(tmp_path: Path, layers: int) -> None:
    stack = [[file(b"d/%03d-%d" % (number, layer), b"") for number in range(300)] for layer in range(layers)]
    stack[-1] += [whiteout(b"d/100-0")] if layers == 2 else [whiteout(b"d/none")]
    tree = make_tree(tmp_path, stack)
    inode = tree.resolve(b"d")
    whole = list(tree.entries(inode))
    assert len(whole) == 300 * layers + 2 - (layers == 2)
    for index, entry in enumerate(whole):
        assert list(tree.entries(inode, entry.next)) == whole[index + 1 :]
    assert {entry.name: entry.nid for entry in whole if entry.name in (b".", b"..")} == {
        b".": inode.nid,
        b"..": tree.root,
    }


def test_forgotten_directories_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = b"/".join([b"level"] * 40)
    layers = [[file(deep + b"/%d" % layer, b"%d" % layer)] for layer in range(3)]
    expected = make_tree(tmp_path, layers)
    numbers = [inode.nid for _, inode in walk(expected, expected.inode(expected.root)) if stat.S_ISDIR(inode.mode)]
    monkeypatch.setattr(merged, "_REMEMBERED", 2)
    monkeypatch.setattr(merged, "_PLACES", 2)
    tree = make_tree(tmp_path, layers)
    # A number that another process of the same tree was given: nothing is known here of the way to it.
    for number in reversed(numbers):
        inode = tree.inode(number)
        above = tree.lookup(inode, b"..")
        assert above is not None
        assert tree.lookup(tree.inode(above), b"level") == number
    assert names(tree, deep) == [b".", b"..", b"0", b"1", b"2"]
    assert len(paths(tree)) == 43


def test_a_number_of_a_hidden_directory_is_refused(tmp_path: Path) -> None:
    tree = make_tree(tmp_path, [[file(b"d/f", b"")], [whiteout(b"d")]])
    with pytest.raises(FormatError, match="not where its parent says"):
        tree.entries(tree.inode(tree.images[0].resolve(b"d").nid))


def test_addresses_are_those_of_the_layer(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, [[file(b"low", b"l" * 5000)], [file(b"high", b"h" * 5000)]])
    tree = MergedTree(open_readers(stack.read, [volume.size for volume in stack.volumes]))
    for path, layer in ((b"low", 0), (b"high", 1)):
        pieces = list(tree.extents(tree.resolve(path), 0, 5000))
        assert {place >> SHIFT for place, _ in pieces if place is not None} == {layer}
        assert b"".join(bytes(stack.read(place or 0, length)) for place, length in pieces) == path[:1] * 5000
    assert stack.stats.to_json()["bytes_read"] > 10_000
    assert stack.try_read_into((1 << SHIFT) + 1024, memoryview(bytearray(4))) == 4


def test_directories_in_two_places_and_circles_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "good", [file(b"a/b/c", b""), file(b"d/e", b"")], synthesise_parents=True)
    content = bytearray((tmp_path / "good").read_bytes())
    reader = ErofsReader(lambda offset, size: bytes(content[offset : offset + size]), len(content))
    numbers = {path: reader.resolve(path).nid for path in (b"a", b"a/b", b"d")}

    def with_entry(old: bytes, new: bytes) -> MergedTree:
        """A tree whose only entry for `old` leads to `new`."""
        changed = bytearray(content)
        places = [
            place
            for place in range(0, len(changed) - DIRENT.size, 4)
            if DIRENT.unpack_from(changed, place)[0] == numbers[old] and DIRENT.unpack_from(changed, place)[2] == 2
        ]
        for place in places:
            _, offset, kind = DIRENT.unpack_from(changed, place)
            DIRENT.pack_into(changed, place, numbers[new], offset, kind)
        image = ErofsReader(lambda offset, size: bytes(changed[offset : offset + size]), len(changed))
        return MergedTree([reader, image])

    for old, new in ((b"a/b", b"a"), (b"a/b", b"d")):
        tree = with_entry(old, new)
        with pytest.raises(FormatError, match="reached from elsewhere"):
            paths(tree)


def test_what_the_kernel_gets_to_see(tmp_path: Path) -> None:
    """Redirects and the like would let a layer name files of others; only `opaque` is passed on."""
    entry, _ = directory(b"d")
    odd = {b"trusted.overlay.redirect": b"/x", b"trusted.overlay.metacopy": b"", b"user.overlay.opaque": b"y"}
    kept = {b"user.kept": b"1", b"security.capability": b"2"}
    inode = make_tree(tmp_path, [[(entry, b"")]]).resolve(b"d")
    assert kernel_xattrs(inode, odd | kept, user=False) == kept
    assert kernel_xattrs(inode, odd | kept | {OPAQUE: b"x"}, user=False) == kept
    assert kernel_xattrs(inode, odd | kept | {OPAQUE: b"y"}, user=False) == kept | {OPAQUE: b"y"}
    assert kernel_xattrs(inode, kept | {OPAQUE: b"y"}, user=True) == kept | {b"user.overlay.opaque": b"y"}


def test_layers_side_by_side(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, [[file(b"f", b"low", uid=7)], [directory(b"d", opaque=True, uid=7)]])
    sizes = [volume.size for volume in stack.volumes]
    tree = LayersTree(open_readers(stack.read, sizes))
    root = tree.inode(tree.root)
    assert [entry.name for entry in tree.entries(root)] == [b"0", b"1"]
    assert [entry.name for entry in tree.entries(root, 1)] == [b"1"]
    for name in (b"2", b"00", b"", b"x"):
        assert tree.lookup(root, name) is None
    low = tree.inode(tree.lookup(root, b"0") or 0)
    found = tree.inode(tree.lookup(low, b"f") or 0)
    assert (tree.read(found, 0, 9), found.uid) == (b"low", 7)
    users = LayersTree(open_readers(stack.read, sizes), user=True)
    top = users.inode(users.lookup(users.inode(users.root), b"1") or 0)
    opened = users.inode(users.lookup(top, b"d") or 0)
    assert (opened.uid, users.xattrs(opened)) == (0, {b"user.overlay.opaque": b"y"})


def test_images_as_files(tmp_path: Path) -> None:
    stack = make_stack(tmp_path, [[file(b"f", os.urandom(9000))], [file(b"g", b"x")]])
    tree = FilesTree([volume.size for volume in stack.volumes], b"encfs-")
    root = tree.inode(tree.root)
    assert [entry.name for entry in tree.entries(root)] == [b"encfs-0", b"encfs-1"]
    assert tree.lookup(root, b"encfs-2") is None
    inode = tree.inode(tree.lookup(root, b"encfs-1") or 0)
    ((place, length),) = tree.extents(inode, 1024, 1 << 30)
    assert place is not None
    assert bytes(stack.read(place, length)) == (tmp_path / "1").read_bytes()[1024:]
    assert list(tree.extents(inode, inode.size, 1)) == []


def test_too_many_layers_are_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "image", [directory(b"")])
    volume = FileVolume(tmp_path / "image")
    with pytest.raises(UnsupportedError, match="at most 500"):
        VolumeStack([volume] * 501)
    volume.close()
