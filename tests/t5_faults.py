"""Daemons that are told to stop, disks that are full, stores that are away, slow or flaky, clocks that jump.

In each case nothing that was acknowledged is lost, what goes wrong is named by its code, and when the trouble is
over everything is published without anybody asking for it. Each test counts how often its trouble struck; one that
never did would prove nothing, and fails.
"""

import contextlib
import errno
import functools
import os
import random
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from devices import Device, World, pattern, scratch
from homes import Person, fails, in_the_foreground, needs_fuse, tmpfs, wait_until, write_synced
from trio import sleep as trio_sleep

from meshkitfs.cli._shown import left_lines
from meshkitfs.daemon import describe
from meshkitfs.errors import MeshkitError
from meshkitfs.fuse import preflight
from meshkitfs.gate import _grant

KIB = 1024
STORE = ("get", "get_many", "put", "put_file", "put_files", "has", "has_many", "sync")
METADATA = ("share_state", "capsules", "roster", "timestamp", "head", "heads", "publish")


# -- tools ---------------------------------------------------------------------------------------------------


class Trouble:
    """Put before calls of an object: ``before(name)`` is awaited first, and may raise or take its time.

    ``fired`` counts the calls it saw while it was on.
    """

    def __init__(self, owner, names, before):
        self.on = True
        self.fired = 0
        for name in names:
            if hasattr(owner, name):
                self._wrap(owner, name, before)

    def _wrap(self, owner, name, before):
        real = getattr(owner, name)

        @functools.wraps(real)
        async def wrapped(*args, **more):
            if self.on:
                self.fired += 1
                await before(name)
            return await real(*args, **more)

        setattr(owner, name, wrapped)


def refusing(code):
    async def before(name):
        raise MeshkitError(code, f"{name}: injected")

    return before


@contextlib.contextmanager
def clock_runs(world):
    """The world's clock goes on by itself, ahead of the real one, but never much ahead of the work of threads."""
    ended = threading.Event()

    def run():
        while not ended.wait(0.001):
            world.pass_time(0.05)

    thread = threading.Thread(target=run, name="clock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def by_itself(device, name="first", noted=True):
    """Nobody asks for anything: time passes, and everything is published, and ``noted`` here as such."""
    share = device.share(name)
    until = time.monotonic() + 60
    staged = functools.partial(device.session.state.staged, share.row.share)
    while share.dirty or share.stuck is not None or share.refusal is not None or (noted and staged()):
        device.world.pass_time(0.05)
        time.sleep(0.001)
        assert time.monotonic() < until, f"it is not published by itself: {share.stuck} {share.refusal}"


def from_the_provider(device):
    """The tree as a home sees it that has nothing in its spool."""
    device.close()
    for at, _, names in os.walk(device.home.cache_dir):
        for name in names:
            os.unlink(os.path.join(at, name))
    device.start()
    return device.view().contents()


@pytest.fixture
def place():
    path = scratch()
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def world():
    with World() as world:
        yield world


@pytest.fixture
def device(world, place):
    device = Device(world, f"{place}/alice", "alice").start()
    device.create_share()
    yield device
    if device.session is not None:
        device.close()


# -- being told to stop ----------------------------------------------------------------------------------------


def stop(person, process):
    """SIGTERM; the daemon's end is in order, and the mount point is free."""
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0, output
    assert "Traceback" not in output + person.logs()
    assert not preflight.is_ours(person.mnt)
    assert os.listdir(person.mnt) == []


@needs_fuse
def test_sigterm_in_the_middle_of_an_upload(tmp_path):
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.cli("share", "create", "first")
        base = alice.mnt / "first"
        with in_the_foreground(alice) as process:
            write_synced(base / "acknowledged", b"synced")
            closed = {f"closed{i}": pattern(i, 1 << 20) + os.urandom(3 << 20) for i in range(12)}
            for name, data in closed.items():
                (base / name).write_bytes(data)
            (base / "small").write_bytes(b"closed just now")
            status = alice.status()
            assert status["left"] or status["pending"]["bytes"], "nothing was on its way: this proves nothing"
            stop(alice, process)
        # It had all the time it needed, so everything is with the provider.
        shutil.rmtree(alice.root / "cache")
        base = alice.mount() / "first"
        assert (base / "acknowledged").read_bytes() == b"synced"
        assert (base / "small").read_bytes() == b"closed just now"
        for name, data in closed.items():
            assert (base / name).read_bytes() == data
        assert alice.status()["left"] == []


@needs_fuse
def test_sigterm_while_the_provider_is_away(tmp_path):
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.cli("share", "create", "first")
        base = alice.mnt / "first"
        away = tmp_path / "away"
        with in_the_foreground(alice) as process:
            write_synced(base / "acknowledged", b"synced")
            alice.blocks.rename(away)
            (base / "closed").write_bytes(pattern(1, 300 * KIB))
            stop(alice, process)
        staged = [path for path in (alice.root / "cache").rglob("*") if path.is_file()]
        assert staged, "what could not be sent was not kept"
        away.rename(alice.blocks)
        base = alice.mount() / "first"
        wait_until(lambda: alice.status()["left"] == [], "the upload that nobody asked for")
        assert (base / "acknowledged").read_bytes() == b"synced"
        assert (base / "closed").read_bytes() == pattern(1, 300 * KIB)
        alice.umount()
        shutil.rmtree(alice.root / "cache")
        assert (alice.mount() / "first/closed").read_bytes() == pattern(1, 300 * KIB)


@needs_fuse
@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_umount_of_a_mount_whose_provider_does_not_answer(tmp_path, force):
    """It takes the time it was given, says what is left, and the daemon ends: nothing waits for the provider."""
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.cli("share", "create", "first")
        base = alice.mnt / "first"
        with in_the_foreground(alice, "silent_store.py") as process:
            (base / "on its way").write_bytes(pattern(1, 300 * KIB))
            wait_until(lambda: alice.share("first")["state"] == "uploading", "the upload")
            # In no local commit yet: the upload is under way, and it is not old enough for one beside it.
            (base / "just now").write_bytes(pattern(2, 300 * KIB))
            done = alice.cli("umount", "--timeout", "0.5", *["--force"][: int(force)], check=False)
            assert done.code == 7, done
            (left,) = done.json["left"]
            assert (left["share"], left["arrived"]) == ("first", 0)
            assert left["bytes"] > 600 * KIB
            assert process.wait(60) == 0
            assert alice.home.holder() is None
        base = alice.mount() / "first"
        assert (base / "on its way").read_bytes() == pattern(1, 300 * KIB)
        assert (base / "just now").read_bytes() == pattern(2, 300 * KIB)
        assert alice.cli("sync") == {"left": []}


# -- full disks ------------------------------------------------------------------------------------------------


class FullAt:
    """Fills a small disk just before the ``number``-th call of a step of the session's services."""

    STEPS = {
        "writing": ("spool", ("write",)),
        "making durable": ("spool", ("sync",)),
        "committing": ("state", ("record_commit",)),
        "uploading": ("store", ("put", "put_file", "put_files")),
        "syncing the store": ("store", ("sync",)),
        "publishing": ("metadata", ("publish",)),
        "noting it down": ("state", ("published",)),
    }

    def __init__(self, disk, step, number=0):
        self.filler = disk / "filler"
        self.left = number
        self.fired = False
        self.step = step

    def install(self, session):
        services = session.services
        owner = {
            "spool": services.spool,
            "state": services.state,
            "store": services.reader.store,
            "metadata": services.metadata,
        }[self.STEPS[self.step][0]]
        for name in self.STEPS[self.step][1]:
            real = getattr(owner, name, None)
            if real is not None:
                # Filling is plain file work, so one wrapper serves both kinds: an async method returns its coroutine.
                setattr(owner, name, functools.partial(self._call, real))

    armed = False

    def _call(self, real, *args, **more):
        if self.armed:
            self.left -= 1
            if self.left < 0 and not self.fired:
                self.fired = True
                self.fill()
        return real(*args, **more)

    def fill(self):
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError), open(self.filler, "ab", 0) as file:
                while True:
                    file.write(bytes(size))

    def make_room(self):
        self.filler.unlink()


def small_disk_home(world, place, disk, which):
    """A device whose home, store or metadata is on the small disk, the rest elsewhere."""
    roots = dict.fromkeys(("home", "store", "metadata"), place) | {which: str(disk)}
    beside = SimpleNamespace(
        blocks=os.path.join(roots["store"], "blocks"), metadata=os.path.join(roots["metadata"], "metadata.db")
    )
    return Device(world, f"{roots['home']}/alice", "alice", beside=beside)


FULL = [
    ("home", "writing", 0),
    ("home", "writing", 5),
    ("home", "making durable", 0),
    ("home", "committing", 0),
    ("home", "uploading", 0),
    ("home", "publishing", 0),
    ("home", "noting it down", 0),
    ("store", "uploading", 0),
    ("store", "syncing the store", 0),
    ("metadata", "publishing", 0),
]


@pytest.mark.parametrize("crash", [False, True], ids=["goes on", "dies"])
@pytest.mark.parametrize(("which", "step", "number"), FULL, ids=lambda value: str(value).replace(" ", "-"))
def test_a_full_disk(world, tmp_path, place, which, step, number, crash):
    """Full at any stage: ENOSPC or success, nothing acknowledged is lost, and with room again it goes on by itself."""
    with tmpfs(tmp_path / "disk", 12 << 20) as disk:
        device = small_disk_home(world, place, disk, which)
        full = FullAt(disk, step, number)
        device.start(full.install)
        try:
            device.create_share()
            view = device.view()
            for i in range(20):
                view.write(f"old{i}", pattern(i, 5 * KIB))
            device.flush()
            acknowledged = view.contents()
            full.armed = True
            fh = view.create("large")
            refused = 0
            written = 0
            # More than the undecided buffer, so that blocks are sealed while it is being written.
            for at in range(0, 3 << 20, 128 * KIB):
                try:
                    view.pwrite(fh, at, pattern(at, 128 * KIB))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    refused += 1
                    break
                written = at + 128 * KIB
            try:
                view.write("small", b"small")
            except OSError as error:
                # Blocks of the large file failed behind its back, and the next writer is told.
                assert error.errno == errno.ENOSPC
                refused += 1
            view.rename("old3", "moved")
            expected = view.contents()
            assert expected["large"][:written] == b"".join(
                pattern(at, 128 * KIB) for at in range(0, written, 128 * KIB)
            ), "what was written is not there to be read"
            try:
                view.fsync(fh)
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
                refused += 1
            assert full.fired, "the disk was never full: this proves nothing"
            if step in ("writing", "making durable", "committing") or (which, step) == ("store", "uploading"):
                assert refused, "everything was acknowledged, on a full disk"
            if refused and device.share().stuck is not None:
                assert device.share().stuck.code == "no_space"
            if not refused:
                acknowledged = expected
            if crash:
                device.crash()
                full.make_room()
                device.start()
                found = device.view().contents()
                assert found in (acknowledged, expected), (
                    "neither what was there before nor what is there after"
                )
                by_itself(device)
                assert from_the_provider(device) == found
            else:
                # What was published and cannot be noted here closes the share, until there is room for the note.
                full.make_room()
                by_itself(device, noted=False)
                view.release(fh)
                # What could not be noted then is noted with the next change.
                view.write("later", b"later")
                expected["later"] = b"later"
                by_itself(device)
                assert view.contents() == expected
                assert from_the_provider(device) == expected
        finally:
            if device.session is not None:
                device.close()


def test_what_is_published_does_not_wait_any_more(world, device):
    """Only noting it down failed; with room again, nothing is left to be sent, and 'umount' must not say so."""
    device.view().write("file", b"content")
    published, failed = device.session.state.published, []

    def full(*args):
        if not failed:
            failed.append(1)
            raise MeshkitError("no_space", "injected")
        published(*args)

    device.session.state.published = full
    with pytest.raises(MeshkitError):
        device.flush()
    assert failed
    for _ in range(100):
        world.pass_time(1)
        time.sleep(0.001)
    assert describe.left(device.session) == []
    assert not device.share().unsent_since, "the next change would seem to wait since then"


def test_what_is_noted_late_does_not_undo_what_came_after(world, device):
    """The note of a publication failed; a change that was made durable here before it succeeded is kept."""
    view, services = device.view(), device.session.services
    view.write("first", b"one")
    published, failed = device.session.state.published, []

    def full(*args):
        failed.append(1)
        raise MeshkitError("no_space", "injected")

    device.session.state.published = full
    with pytest.raises(MeshkitError):
        device.flush()
    services.fsync_publishes = False
    fh = view.create("second")
    view.pwrite(fh, 0, pattern(2, 400 * KIB))
    with pytest.raises(MeshkitError):
        world.run(device.share().journal)
    assert len(failed) >= 2, "it was not tried again: this proves nothing"
    device.session.state.published = published
    view.fsync(fh)
    assert device.session.state.local_commit(device.share().row.share) is not None
    device.crash()
    device.start()
    assert device.view().contents() == {"first": b"one", "second": pattern(2, 400 * KIB)}
    by_itself(device)
    assert from_the_provider(device) == {"first": b"one", "second": pattern(2, 400 * KIB)}


# -- the provider ------------------------------------------------------------------------------------------------


@needs_fuse
@pytest.mark.parametrize("end", ["umount", "kill"])
def test_the_provider_is_away_and_comes_back(tmp_path, end):
    """Work goes on, fsync says EIO, status says why; a daemon that ends meanwhile loses nothing of it."""
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.cli("share", "create", "first")
        base = alice.mount() / "first"
        write_synced(base / "before", b"before")
        away = tmp_path / "away"
        alice.blocks.rename(away)
        (base / "during").write_bytes(b"first try")
        os.mkdir(base / "directory")
        (base / "directory/large").write_bytes(pattern(1, 400 * KIB))
        os.rename(base / "before", base / "renamed")
        with fails(errno.EIO):
            write_synced(base / "during", b"written while it was away")
        assert (base / "during").read_bytes() == b"written while it was away"
        wait_until(lambda: any(item["reason"] for item in alice.status()["left"]), "the reason in status")
        (left,) = alice.status()["left"]
        assert (left["share"], left["reason"]) == ("first", "provider_request_failed")
        assert left["blocks"] > 0
        assert "provider_request_failed" in alice.errors_text()
        assert alice.explain(base / "during")["code"] == "provider_request_failed"
        if end == "kill":
            alice.kill9()
        else:
            assert alice.cli("umount", check=False).code == 7
        waiting = {path for path in (alice.root / "cache").rglob("*") if path.is_file()}
        assert waiting, "nothing was staged: this proves nothing"
        # A store that is not there is not an empty one. What is on this device is there after a mount, the rest
        # fails, and what waits is not touched.
        base = alice.mount() / "first"
        assert (base / "during").read_bytes() == b"written while it was away"
        assert (base / "directory/large").read_bytes() == pattern(1, 400 * KIB)
        with fails(errno.EIO):
            (base / "renamed").read_bytes()
        alice.cli("umount", check=False)
        # What waits can be asked for all the same, and waited for.
        (left,) = alice.cli("status")["left"]
        assert left["share"] == "first"
        assert left["state"] in ("dirty", "stuck")
        assert 0 < left["blocks"] <= len(waiting)
        done = alice.cli("sync", "--timeout", "1", check=False)
        assert (done.code, done.json["left"][0]["reason"]) == (7, "provider_request_failed")
        assert waiting <= {path for path in (alice.root / "cache").rglob("*") if path.is_file()}
        away.rename(alice.blocks)
        base = alice.mount() / "first"
        wait_until(lambda: alice.status()["left"] == [], "the upload that nobody asked for")
        wanted = {"during": b"written while it was away", "renamed": b"before"}
        for _ in range(2):
            assert sorted(os.listdir(base)) == ["directory", "during", "renamed"]
            for name, data in wanted.items():
                assert (base / name).read_bytes() == data
            assert (base / "directory/large").read_bytes() == pattern(1, 400 * KIB)
            alice.umount()
            shutil.rmtree(alice.root / "cache", ignore_errors=True)
            base = alice.mount() / "first"


def test_what_cannot_be_opened_at_the_start_is_taken_up_later(world, device):
    """A store that fails while a home starts does not keep unsent changes until somebody opens the share."""
    view = device.view()
    view.write("before", pattern(1, 300 * KIB))
    device.flush()
    fh = view.create("unsent")
    view.pwrite(fh, 0, b"unsent")
    world.run(device.share().journal)
    device.crash()
    troubles = []

    def prepare(session):
        async def fails(_name):
            raise MeshkitError("provider_request_failed", "on purpose")

        troubles.append(Trouble(session.services.reader, ["open_root"], fails))

    device.start(prepare)
    (trouble,) = troubles
    until = time.monotonic() + 30
    while trouble.fired < 3:
        world.pass_time(1)
        assert time.monotonic() < until, "it was tried once, and never again"
    (left,) = describe.left(device.session)
    assert (left["share"], left["state"], left["reason"]) == ("first", "stuck", "provider_request_failed")
    assert left["blocks"] > 0
    trouble.on = False
    while device.session.state.unpublished():
        world.pass_time(1)
        assert time.monotonic() < until, "nobody asked for it, and so it stays"
    by_itself(device)
    assert from_the_provider(device) == {"before": pattern(1, 300 * KIB), "unsent": b"unsent"}


@needs_fuse
def test_the_provider_comes_back_under_a_running_mount(tmp_path):
    with Person(tmp_path / "alice", "alice") as alice:
        alice.init()
        alice.cli("share", "create", "first")
        base = alice.mount() / "first"
        assert os.listdir(base) == []
        away = tmp_path / "away"
        alice.blocks.rename(away)
        (base / "file").write_bytes(pattern(1, 200 * KIB))
        wait_until(
            lambda: [item["reason"] for item in alice.status()["left"]] == ["provider_request_failed"], "it"
        )
        away.rename(alice.blocks)
        wait_until(lambda: alice.status()["left"] == [], "the upload that nobody asked for")
        assert alice.share("first")["reason"] is None
        # And fsync is true again.
        write_synced(base / "file", b"once more")


def test_requests_fail_from_one_start_to_the_next(world, device):
    """The store is there and answers nothing, also after a restart; what is known here can be worked on."""
    view = device.view()
    view.write("before", b"before")
    device.flush()
    trouble = Trouble(device.session.store, STORE, refusing("provider_request_failed"))
    fh = view.create("during")
    view.pwrite(fh, 0, pattern(1, 300 * KIB))
    with clock_runs(world), pytest.raises(OSError) as caught:
        view.fsync(fh)
    assert caught.value.errno == errno.EIO
    device.crash()
    later = []
    device.start(
        lambda session: later.append(Trouble(session.store, STORE, refusing("provider_request_failed")))
    )
    view = device.view()
    # The version that waits is in the spool, all of it that is new.
    assert view.read("during") == pattern(1, 300 * KIB)
    view.write("after", b"after")
    world.pass_time(30)
    wait_until(lambda: device.share().stuck is not None, "the failed upload")
    assert device.share().stuck.code == "provider_request_failed"
    assert trouble.fired
    assert later[0].fired
    later[0].on = False
    by_itself(device)
    wanted = {"before": b"before", "during": pattern(1, 300 * KIB), "after": b"after"}
    assert view.contents() == wanted
    assert from_the_provider(device) == wanted


def work_with_fsync(device, count, dice):
    """Files that are made and changed with fsync, which may have to be asked again; returns what is acknowledged."""
    view = device.view()
    acknowledged, told = {}, 0
    for i in range(count):
        name = f"file{dice.randrange(8)}"
        data = pattern(i, dice.choice((10, 20 * KIB, 300 * KIB)))
        while True:
            # From the beginning each time, as a program would that was told EIO somewhere.
            try:
                view.write(name, data)
                fh = view.open(name, os.O_RDONLY)
                try:
                    view.fsync(fh)
                    break
                finally:
                    view.release(fh)
            except OSError as error:
                assert error.code == "provider_request_failed"
                told += 1
        acknowledged[name] = data
    return acknowledged, told


def test_a_slow_provider(world, device):
    """100 ms for each request."""

    async def slow(name):
        await trio_sleep(0.1)

    trouble = Trouble(device.session.store, STORE, slow)
    with clock_runs(world):
        acknowledged, told = work_with_fsync(device, 12, random.Random(1))
    assert told == 0
    assert trouble.fired > 12
    by_itself(device)
    trouble.on = False
    assert from_the_provider(device) == acknowledged


def test_a_provider_that_fails_three_times_in_ten(world, device):
    seed = int(os.environ.get("SEED", random.SystemRandom().randrange(1 << 30)))
    print(f"seed {seed}")
    dice = random.Random(seed)
    failed = []

    async def flaky(name):
        if dice.random() < 0.3:
            failed.append(name)
            raise MeshkitError("provider_request_failed", f"{name}: injected")

    trouble = Trouble(device.session.store, STORE, flaky)
    acknowledged = {}
    for _ in range(3):
        with clock_runs(world):
            more, _told = work_with_fsync(device, 10, dice)
        acknowledged |= more
        # What an fsync acknowledged is there although the process dies and its spool is lost.
        trouble.on = False
        device.crash()
        shutil.rmtree(device.home.cache_dir)
        device.start()
        assert device.view().contents() == acknowledged
        trouble = Trouble(device.session.store, STORE, flaky)
    assert len(failed) > 5, "it hardly ever failed: this proves nothing"
    device.view().write("last", b"closed, and no more")
    by_itself(device)
    trouble.on = False
    assert from_the_provider(device) == acknowledged | {"last": b"closed, and no more"}


def test_the_provider_is_away_when_the_mount_starts(world, device):
    """What an earlier run left is published when it comes back, although nobody opens anything."""
    view = device.view()
    for i in range(400):
        view.release(view.create(f"file{i:03}"))
    device.flush()
    trouble = Trouble(device.session.store, STORE, refusing("provider_request_failed"))
    view.write("unsent", pattern(1, 100 * KIB))
    with fails(errno.EIO):
        view.fsync(view.open("unsent"))
    assert trouble.fired
    trouble.on = False
    expected = view.contents()
    device.crash()
    later = []
    device.start(
        lambda session: later.append(Trouble(session.store, STORE, refusing("provider_request_failed")))
    )
    share = device.share()
    wait_until(lambda: world.pass_time(1) or share.stuck is not None, "the first try")
    assert later[0].fired
    assert share.tree is None, "the share could be opened: this proves nothing"
    [left] = describe.left(device.session)
    assert (left["state"], left["reason"], left["unsaved"]) == ("stuck", "provider_request_failed", False)
    later[0].on = False
    by_itself(device)
    assert describe.left(device.session) == []
    assert from_the_provider(device) == expected


# -- the metadata store ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", ["none", "close", "crash"])
def test_the_metadata_store_refuses_and_comes_back(world, device, restart):
    view = device.view()
    view.write("before", b"before")
    device.flush()
    device.refresh()
    trouble = Trouble(device.session.metadata, METADATA, refusing("metadata_unavailable"))
    fh = view.create("during")
    view.pwrite(fh, 0, b"during")
    with fails(errno.EIO):
        view.fsync(fh)
    assert device.share().stuck.code == "metadata_unavailable"
    # The lease lives on.
    assert view.contents() == {"before": b"before", "during": b"during"}
    fired = trouble.fired
    assert fired
    if restart != "none":
        getattr(device, restart)()
        later = []
        device.start(
            lambda session: later.append(
                Trouble(session.metadata, METADATA, refusing("metadata_unavailable"))
            )
        )
        trouble = later[0]
        view = device.view()
        # Nobody vouches for the grant now; the share is one's own, so it is shown, and nothing is given up.
        assert view.read("during") == b"during"
        assert device.share().unconfirmed.code == "freshness_unproven"
        assert trouble.fired
        assert device.session.state.unpublished()
    trouble.on = False
    by_itself(device)
    wanted = {"before": b"before", "during": b"during"}
    assert view.contents() == wanted
    assert from_the_provider(device) == wanted


def test_what_is_in_memory_only_is_named(world, device):
    """The identity is locked, so there is no key to commit with: 'umount' must not call it safe."""
    view = device.view()
    view.write("journaled", b"journaled")
    world.run(device.share().journal)
    [left] = describe.left(device.session)
    assert not left["unsaved"]
    view.write("in memory", b"in memory")
    gate = device.session.gate
    unlocked = gate._encryption

    def locked():
        raise MeshkitError("identity_locked")

    gate._encryption = locked
    walk_the_gate(device)
    [left] = describe.left(device.session)
    assert (left["unsaved"], left["reason"]) == (True, "identity_locked")
    assert "memory only" in "".join(left_lines([left]))
    assert "safe" not in "".join(left_lines([left]))
    gate._encryption = unlocked
    by_itself(device)
    assert view.contents() == {"journaled": b"journaled", "in memory": b"in memory"}


# -- clocks ------------------------------------------------------------------------------------------------------


class Wall:
    """The clock on the wall of one device, which can be set."""

    def __init__(self):
        self.offset = 0.0

    def __call__(self):
        return time.time() + self.offset

    def install(self, session):
        session.services.wall = session.clock._wall = session.metadata._clock = self


def walk_the_gate(device):
    """Have the grant renewed, as it is when something was published or the lease ends."""
    device.share()._tick = -1
    device.refresh()


@pytest.fixture
def wall():
    return Wall()


@pytest.fixture
def clocked(world, place, wall):
    device = Device(world, f"{place}/alice", "alice").start(wall.install)
    device.create_share()
    yield device
    if device.session is not None:
        device.close()


def test_the_clock_jumps_a_day_ahead_and_back(world, clocked, wall):
    view = clocked.view()
    view.write("before", b"before")
    clocked.flush()
    view.write("unsent", pattern(1, 100 * KIB))
    wall.offset = 86400
    walk_the_gate(clocked)
    assert clocked.share().refusal is None
    view.write("ahead", b"made tomorrow")
    by_itself(clocked)
    # Corrected: this device has seen tomorrow, so today cannot be proved to be now.
    fh = view.open("before")
    view.pwrite(fh, 0, b"BEFORE")
    wall.offset = 0
    walk_the_gate(clocked)
    assert clocked.share().refusal.code == "clock_rollback"
    with pytest.raises(OSError) as caught:
        view.fsync(fh)
    assert (caught.value.errno, caught.value.code) == (errno.EACCES, "clock_rollback")
    # The person says that it is right now; see 'doctor --reset-clock'.
    clocked.session.clock.reset()
    by_itself(clocked)
    wanted = {"before": b"BEFORE", "unsent": pattern(1, 100 * KIB), "ahead": b"made tomorrow"}
    assert view.contents() == wanted
    assert from_the_provider(clocked) == wanted


@pytest.mark.parametrize("seconds", [600, 3600])
def test_the_clock_jumps_back_and_is_corrected(world, clocked, wall, seconds):
    view = clocked.view()
    view.write("before", b"before")
    clocked.flush()
    walk_the_gate(clocked)
    view.write("unsent", pattern(1, 100 * KIB))
    wall.offset = -seconds
    # A living lease counts on a clock that nobody sets; when it has to be renewed, the wall clock is asked.
    assert view.read("before") == b"before"
    walk_the_gate(clocked)
    assert clocked.share().refusal.code == "clock_rollback"
    with fails(errno.EACCES):
        view.read("before")
    wall.offset = 0
    by_itself(clocked)
    wanted = {"before": b"before", "unsent": pattern(1, 100 * KIB)}
    assert view.contents() == wanted
    assert from_the_provider(clocked) == wanted


def test_a_minute_back_is_no_attack(world, clocked, wall):
    view = clocked.view()
    wall.offset = -60
    walk_the_gate(clocked)
    assert clocked.share().refusal is None
    view.write("file", b"content")
    clocked.flush()
    assert from_the_provider(clocked) == {"file": b"content"}


def test_a_lease_is_renewed_ahead_after_the_machine_slept(world, device, monkeypatch):
    """Its end counts on a clock that goes on in sleep, and so does the look ahead."""
    device.view().write("file", b"content")
    device.flush()
    device.refresh()
    grant = device.share().grant
    real = time.clock_gettime
    slept = grant.deadline - real(_grant._LEASE_CLOCK) - 30
    assert slept > 0
    monkeypatch.setattr(
        time, "clock_gettime", lambda clock: real(clock) + (slept if clock == _grant._LEASE_CLOCK else 0)
    )
    assert grant.alive
    device.refresh()
    assert device.share().grant is not grant, "it was left to run out"


# -- fsync beside a revocation ------------------------------------------------------------------------------------


def test_fsync_waits_for_a_change_that_a_revocation_takes_along(world, device, place):
    """A revocation publishes the tree anew; what was changed meanwhile is in it, and is not safe before it is out."""
    bob = Device(world, f"{place}/bob", "bob", beside=device).start()
    try:
        device.grant("first", bob)
        view = device.view()
        view.write("first", b"first")
        publish = device.session.metadata.publish
        seen, results = [], []

        async def watched(publication):
            seen.append(publication)
            if len(seen) == 1:
                # What comes before the revocation is just being published, and somebody goes on working.
                node = device.share().tree.new_file(0o644)
                async with device.share().changing() as tree:
                    tree.create(tree.root, b"meanwhile", node)
                    tree.touch(node, content=True)
            else:
                results.append(device.share().dirty)
            await publish(publication)

        device.session.metadata.publish = watched
        world.run(device.session.book.revoke, device.share(), "bob")
        assert len(seen) == 2, "the revocation did not publish twice: this proves nothing"
        assert results == [True], "fsync would have returned before the change was anywhere"
    finally:
        bob.close()


def test_a_listing_goes_on_beside_a_revocation(world, device, place):
    """The owner's own directory, opened before the share moved to a new epoch and read after it."""
    bob = Device(world, f"{place}/bob", "bob", beside=device).start()
    try:
        device.grant("first", bob)
        view = device.view()
        view.write("file", b"content")
        device.flush()
        ino = view.attr("").ino
        fh = world.run(device.fs.opendir, ino)
        world.run(device.session.book.revoke, device.share(), "bob")
        assert device.share().live("list") is None, "it has a grant already: this proves nothing"
        assert [name for name, _, _ in device.fs.readdir(fh, 0)] == [b".", b"..", b"file"]
        # A refusal ends it all the same.

        async def refuse():
            device.share().refuse(MeshkitError("share_revoked", "a test"))

        world.run(refuse)
        with pytest.raises(MeshkitError) as caught:
            list(device.fs.readdir(fh, 0))
        assert caught.value.code == "share_revoked"
        world.run(device.fs.releasedir, fh)
    finally:
        bob.close()
