# SPDX-License-Identifier: Apache-2.0
# Whether a save from a page file shares its blocks or copies them: what the file system says, and
# what else has it copied; either way the checkpoint is right and the log says how it was made.
"""When hift_ext.save copies."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import models
import pytest
from filesystems import mounted
from test_checkpoint import SHARD, everything, make, same
from test_reflink import SHARING, digest, on_disk, said, streams_of

import hift_ext
from hift_ext import manifest, reflink


def test_the_file_system_decides(tmp_path, caplog) -> None:
    """Whatever the file system here can: the checkpoint is right, and the log says how."""
    caplog.set_level(logging.INFO, "hift_ext")
    model, optimizer = make(store=f"disk:{tmp_path / 'pages'}")
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, tmp_path / "saved")
    (words,) = said(caplog)
    assert words == SHARING or words.startswith("the page file is copied: ")
    _, again = make(seed=1)
    hift_ext.load(again, tmp_path / "saved")
    assert same(everything(again), everything(optimizer))
    optimizer.close()


@pytest.mark.needs("ext4")
def test_ext4_shares_nothing(tmp_path, caplog) -> None:
    with mounted("ext4", tmp_path) as place:
        copies_to(place / "saved", place / "pages", "Operation not supported", caplog)
        copies_to(tmp_path / "saved", place / "pages", "Invalid cross-device link", caplog)


@pytest.mark.needs("tmpfs")
def test_tmpfs_shares_nothing(tmp_path, caplog) -> None:
    folder = Path("/dev/shm") / f"hift-test-{os.getpid()}"
    folder.mkdir()
    try:
        copies_to(folder / "saved", folder / "pages", "cannot share its blocks", caplog)
    finally:
        shutil.rmtree(folder)


def copies_to(target: Path, pages: Path, why: str, caplog: Any) -> None:
    """Saves from a page file to where its blocks cannot be shared."""
    caplog.set_level(logging.INFO, "hift_ext")
    caplog.clear()
    model, optimizer = make(store=f"disk:{pages}")
    models.train(model, optimizer, models.batches(6))
    hift_ext.save(optimizer, target)
    (words,) = said(caplog)
    assert words.startswith("the page file is copied: ")
    assert why in words
    assert sorted(os.listdir(target)) == [manifest.NAME, SHARD]
    assert all(len(pieces) == 1 for pieces in streams_of(target).values())
    _, again = make(seed=1)
    hift_ext.load(again, target)
    assert same(everything(again), everything(optimizer))
    optimizer.close()


@pytest.mark.parametrize("name", ["EOPNOTSUPP", "EXDEV", "EINVAL", "ENOTTY"])
def test_what_cannot_be_shared_is_copied(name, tmp_path, monkeypatch, caplog) -> None:
    code = getattr(errno, name)

    def ioctl(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(reflink.fcntl, "ioctl", ioctl)
    copies_to(tmp_path / "saved", tmp_path / "pages", os.strerror(code), caplog)


@pytest.mark.parametrize("name", ["ENOSPC", "EIO", "EPERM", "EBADF"])
def test_other_errors_are_errors(name, tmp_path, monkeypatch) -> None:
    optimizer, code = on_disk(4), getattr(errno, name)
    hift_ext.save(optimizer, tmp_path / "saved")
    before = digest(tmp_path / "saved")

    def ioctl(*_: Any) -> None:
        raise OSError(code, "not today")

    monkeypatch.setattr(reflink.fcntl, "ioctl", ioctl)
    with pytest.raises(OSError, match=rf"{SHARD} of \d+ bytes: not today") as caught:
        hift_ext.save(optimizer, tmp_path / "saved")
    assert caught.value.errno == code
    assert os.listdir(tmp_path) == ["saved"]
    assert digest(tmp_path / "saved") == before
    optimizer.close()


def test_a_disk_without_room_for_later_steps(tmp_path, monkeypatch, caplog) -> None:
    """After a copy no step needs new blocks; after sharing each does, and they must be there."""
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        fields = list(real(path))
        fields[4] = 1  # f_bavail
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", statvfs)
    copies_to(tmp_path / "saved", tmp_path / "pages", "bytes anew, and only", caplog)


def test_pages_that_cannot_be_written_are_copied(tmp_path, monkeypatch, caplog) -> None:
    """They are still in the ring: a save to another disk is what is left to do."""

    real = reflink.PagedEngine.flush

    def flush(_: Any) -> None:
        monkeypatch.setattr(reflink.PagedEngine, "flush", real)
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(reflink.PagedEngine, "flush", flush)
    copies_to(tmp_path / "saved", tmp_path / "pages", "could not be written", caplog)


def test_a_header_that_readers_refuse(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(reflink, "MOST_HEAD_BYTES", 4096)
    copies_to(tmp_path / "saved", tmp_path / "pages", "more than readers take", caplog)
