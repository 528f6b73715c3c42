"""A filesystem in memory, with handles to hold it up, make it fail and change it behind the kernel's back.

It exists to test the FUSE adapter alone. Run as a program it is the daemon under test: it mounts itself
at the directory given and takes commands as JSON lines on stdin, answering each with one line on stdout
(`Commands` below lists them). Nothing of it is meant for use.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import queue
import select
import stat
import threading
import time
from bisect import bisect_right
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field

import trio

from meshkitfs.errors import MeshkitError
from meshkitfs.vfs.types import (
    ROOT_INO,
    Attr,
    ForgetEntry,
    ForgetInode,
    Invalidation,
    Opened,
    SetAttr,
    StatFs,
)

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def refuse(code):
    return OSError(code, os.strerror(code))


@dataclass(slots=True)
class Node:
    ino: int
    mode: int
    nlink: int = 1
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # name -> (position, inode)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    references: int = 0
    handles: int = 0
    changed: int = field(default_factory=time.time_ns)


class MemVfs:
    """Implements `meshkitfs.vfs.types.Filesystem`.

    ``calls`` counts calls by method; ``trouble`` maps a method to an exception to raise instead;
    ``gates`` maps a method to an event it waits for first; ``history`` notes fh and flags of interest.
    """

    def __init__(self, timeout=300.0):
        self.invalidations: queue.SimpleQueue[Invalidation] = queue.SimpleQueue()
        self.nodes = {ROOT_INO: Node(ROOT_INO, stat.S_IFDIR | 0o755, nlink=2)}
        self.handles: dict[int, tuple[Node, int]] = {}
        self.listings: dict[int, list[tuple[int, bytes, int]]] = {}
        self.timeout = timeout
        self.calls: Counter[str] = Counter()
        self.trouble: dict[str, BaseException] = {}
        self.gates: dict[str, trio.Event] = {}
        self.waiting: Counter[str] = Counter()
        self.history: list[tuple] = []
        self._last = ROOT_INO
        self._position = 0

    # -- helpers ---------------------------------------------------------------------------------------

    async def _enter(self, method):
        self.calls[method] += 1
        if method in self.gates:
            self.waiting[method] += 1
            try:
                await self.gates[method].wait()
            finally:
                self.waiting[method] -= 1
        if method in self.trouble:
            raise self.trouble[method]

    def _next(self):
        self._last += 1
        return self._last

    def _node(self, ino):
        if ino not in self.nodes:
            raise refuse(errno.ENOENT)
        return self.nodes[ino]

    def _child(self, parent, name):
        found = self._node(parent).names.get(name)
        return None if found is None else self.nodes[found[1]]

    def attr(self, node):
        size = len(node.data)
        return Attr(
            node.ino,
            node.mode,
            node.nlink,
            size,
            (size + 511) // 512,
            node.changed,
            node.changed,
            node.changed,
            self.timeout,
            self.timeout,
        )

    def _attach(self, parent, name, node):
        self._position += 1
        directory = self._node(parent)
        directory.names.pop(name, None)
        directory.names[name] = (self._position, node.ino)
        directory.changed = time.time_ns()

    def _new(self, parent, name, mode):
        if self._child(parent, name) is not None:
            raise refuse(errno.EEXIST)
        ino = self._next()
        node = self.nodes[ino] = Node(ino, mode)
        self._attach(parent, name, node)
        node.references += 1
        return node

    def _drop(self, node):
        if not node.nlink and not node.references and not node.handles:
            self.nodes.pop(node.ino, None)

    def _open(self, node, flags):
        if flags & os.O_TRUNC:
            del node.data[:]
        fh = self._next()
        node.handles += 1
        self.handles[fh] = (node, flags)
        return Opened(fh, keep_cache=True)

    def find(self, path):
        node = self.nodes[ROOT_INO]
        for name in path.encode().split(b"/"):
            node = self._child(node.ino, name)
        return node

    # -- Filesystem ------------------------------------------------------------------------------------

    async def lookup(self, parent, name):
        await self._enter("lookup")
        node = self._child(parent, name)
        if node is None:
            return Attr(0, 0, 0, 0, 0, 0, 0, 0, self.timeout, self.timeout)
        node.references += 1
        return self.attr(node)

    def looked_up(self, ino):
        self.calls["looked_up"] += 1
        self.nodes[ino].references += 1

    def forget(self, ino, count):
        self.calls["forget"] += 1
        if "forget" in self.trouble:
            raise self.trouble["forget"]
        if node := self.nodes.get(ino):
            node.references -= count
            self._drop(node)

    async def getattr(self, ino):
        await self._enter("getattr")
        return self.attr(self._node(ino))

    async def setattr(self, ino, changes: SetAttr, fh):
        await self._enter("setattr")
        self.history.append(("setattr", fh, changes.mode, changes.size, changes.mtime_ns))
        node = self._node(ino)
        if changes.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | changes.mode
        if changes.size is not None:
            del node.data[changes.size :]
            node.data.extend(bytes(changes.size - len(node.data)))
        node.changed = changes.mtime_ns or time.time_ns()
        return self.attr(node)

    async def readlink(self, ino):
        await self._enter("readlink")
        return bytes(self._node(ino).data)

    async def mkdir(self, parent, name, mode):
        await self._enter("mkdir")
        return self.attr(self._new(parent, name, stat.S_IFDIR | mode))

    async def symlink(self, parent, name, target):
        await self._enter("symlink")
        node = self._new(parent, name, stat.S_IFLNK | 0o777)
        node.data += target
        return self.attr(node)

    async def link(self, ino, parent, name):
        await self._enter("link")
        if self._child(parent, name) is not None:
            raise refuse(errno.EEXIST)
        node = self._node(ino)
        self._attach(parent, name, node)
        node.nlink += 1
        node.references += 1
        return self.attr(node)

    async def unlink(self, parent, name):
        await self._enter("unlink")
        node = self._child(parent, name)
        if node is None:
            raise refuse(errno.ENOENT)
        del self._node(parent).names[name]
        node.nlink -= 1
        self._drop(node)

    async def rmdir(self, parent, name):
        await self._enter("rmdir")
        node = self._child(parent, name)
        if node is None or node.names:
            raise refuse(errno.ENOENT if node is None else errno.ENOTEMPTY)
        del self._node(parent).names[name]
        node.nlink = 0
        self._drop(node)

    async def rename(self, old_parent, old_name, new_parent, new_name, flags):
        await self._enter("rename")
        self.history.append(("rename", flags))
        if flags & ~RENAME_NOREPLACE:
            raise refuse(errno.EINVAL)
        node, old = self._child(old_parent, old_name), self._child(new_parent, new_name)
        if old is not None and flags & RENAME_NOREPLACE:
            raise refuse(errno.EEXIST)
        del self._node(old_parent).names[old_name]
        self._attach(new_parent, new_name, node)
        if old is not None and old is not node:
            old.nlink -= 1
            self._drop(old)

    async def open(self, ino, flags):
        await self._enter("open")
        self.history.append(("open", flags & (os.O_APPEND | os.O_TRUNC)))
        return self._open(self._node(ino), flags)

    async def create(self, parent, name, mode, flags):
        await self._enter("create")
        self.history.append(("create", mode, flags & os.O_APPEND))
        node = self._new(parent, name, stat.S_IFREG | mode)
        return self._open(node, flags), self.attr(node)

    async def read(self, fh, offset, size):
        await self._enter("read")
        return memoryview(self.handles[fh][0].data[offset : offset + size])

    async def write(self, fh, offset, data):
        await self._enter("write")
        node, flags = self.handles[fh]
        if flags & os.O_APPEND and offset != len(node.data):
            # The kernel's idea of the end is out of date; the data belongs at the real one.
            offset = len(node.data)
            self.invalidations.put(ForgetInode(node.ino))
        if offset > len(node.data):
            node.data.extend(bytes(offset - len(node.data)))
        node.data[offset : offset + len(data)] = data
        node.changed = time.time_ns()
        return len(data)

    async def flush(self, fh):
        await self._enter("flush")

    async def fsync(self, fh, datasync):
        await self._enter("fsync")
        self.history.append(("fsync", datasync))

    async def release(self, fh):
        await self._enter("release")
        node, _ = self.handles.pop(fh)
        node.handles -= 1
        self._drop(node)

    async def opendir(self, ino):
        await self._enter("opendir")
        fh = self._next()
        self.handles[fh] = (self._node(ino), 0)
        return fh

    def readdir(self, fh, start):
        self.calls["readdir"] += 1
        node, _ = self.handles[fh]
        if start == 0:
            self.listings[fh] = sorted((place, name, ino) for name, (place, ino) in node.names.items())
        listing = self.listings[fh]
        for place, name, ino in listing[bisect_right(listing, start, key=lambda entry: entry[0]) :]:
            if "readdir" in self.trouble and name.endswith(b"!"):
                raise self.trouble["readdir"]
            if node.names.get(name) == (place, ino):
                yield name, self.attr(self.nodes[ino]), place

    async def fsyncdir(self, fh):
        await self._enter("fsyncdir")

    async def releasedir(self, fh):
        await self._enter("releasedir")
        self.listings.pop(fh, None)
        del self.handles[fh]

    async def statfs(self):
        await self._enter("statfs")
        return StatFs(4096, 1 << 30, 1 << 29, 1000, 500)

    async def getxattr(self, ino, name):
        await self._enter("getxattr")
        if name not in self._node(ino).xattrs:
            raise refuse(errno.ENODATA)
        return self._node(ino).xattrs[name]

    async def setxattr(self, ino, name, value):
        await self._enter("setxattr")
        self._node(ino).xattrs[name] = value

    async def listxattr(self, ino):
        await self._enter("listxattr")
        return list(self._node(ino).xattrs)

    async def removexattr(self, ino, name):
        await self._enter("removexattr")
        if name not in self._node(ino).xattrs:
            raise refuse(errno.ENODATA)
        del self._node(ino).xattrs[name]


EXCEPTIONS = {
    "value": lambda: ValueError("a defect"),
    "group": lambda: ExceptionGroup("two", [ValueError("a defect"), MeshkitError("share_revoked")]),
    "badnumber": lambda: OSError("no number"),
    "interrupt": KeyboardInterrupt,
    "slow": trio.TooSlowError,
    "enosys": lambda: refuse(errno.ENOSYS),
    "enospc": lambda: refuse(errno.ENOSPC),
    "share_revoked": lambda: MeshkitError("share_revoked"),
    "cid_mismatch": lambda: MeshkitError("cid_mismatch"),
}


class Commands:
    """What a test may ask of the daemon: each public method is a command."""

    def __init__(self, fs, mounted, stop):
        self._fs, self._mounted, self._stop = fs, mounted, stop
        self._spinning = False

    async def ping(self):
        return "pong"

    async def calls(self):
        return dict(self._fs.calls)

    async def history(self):
        return self._fs.history

    async def state(self):
        readiness = self._mounted.readiness
        return {
            "nodes": len(self._fs.nodes),
            "handles": len(self._fs.handles),
            "hits": readiness.hits,
            "sleeps": readiness.sleeps,
            "busy": self._mounted.workers.busy,
            "invalidated": self._mounted.invalidator.delivered,
            "waiting": dict(self._fs.waiting),
            "references": {ino: node.references for ino, node in self._fs.nodes.items()},
        }

    async def content(self, path):
        return bytes(self._fs.find(path).data).decode("latin-1")

    async def make(self, path, text=""):
        """Put a file there as another writer would."""
        parent, _, name = path.rpartition("/")
        ino = self._fs.find(parent).ino if parent else ROOT_INO
        node = self._fs._new(ino, name.encode(), stat.S_IFREG | 0o644)
        node.references -= 1
        node.data += text.encode("latin-1")
        return node.ino

    async def remote_append(self, path, text):
        node = self._fs.find(path)
        node.data += text.encode("latin-1")
        node.changed = time.time_ns()
        return node.ino

    async def forget(self, ino, attr_only=False):
        self._fs.invalidations.put(ForgetInode(ino, attr_only))

    async def forget_name(self, parent, name, deleted=0):
        self._fs.invalidations.put(ForgetEntry(parent, name.encode(), deleted))

    async def drained(self):
        await self._mounted.invalidator.drained()

    async def is_drained(self):
        with trio.move_on_after(0.3):
            await self._mounted.invalidator.drained()
            return True
        return False

    async def wait_invalidated(self, count):
        while self._mounted.invalidator.delivered < count:
            await trio.sleep(0.005)

    async def gate(self, method):
        self._fs.gates[method] = trio.Event()

    async def open_gate(self, method):
        self._fs.gates.pop(method).set()

    async def wait_for(self, method, count):
        """Return when ``count`` calls of ``method`` wait at its gate."""
        while self._fs.waiting[method] != count:
            await trio.sleep(0.005)

    async def wait_nodes(self, count):
        """Return when the kernel has let go of all but ``count`` nodes."""
        while len(self._fs.nodes) != count:
            await trio.sleep(0.005)

    async def fail(self, method, how=None):
        self._fs.trouble.pop(method, None)
        if how is not None:
            self._fs.trouble[method] = EXCEPTIONS[how]()

    async def hold_next_request(self):
        """Stop between the look that finds the next request and the read of it, until a byte comes.

        Says "held" when it has stopped; blocks the whole process, as the window it widens does.
        """
        readiness = type(self._mounted.readiness)
        original = readiness._leave

        def leave(self, events):
            readiness._leave = original
            os.write(1, b'"held"\n')
            select.select([0], [], [])
            os.read(0, 1)
            original(self, events)

        readiness._leave = leave

    async def compute(self, on):
        """Start or end a thread that only computes."""
        self._spinning = on

        def work():
            while self._spinning:
                sum(range(1000))

        if on:
            threading.Thread(target=work, daemon=True).start()

    async def stop(self):
        self._stop.set()


async def serve(arguments):
    from meshkitfs.fuse import mount as adapter

    if arguments.stock:  # pyfuse3 as it comes, for comparison
        adapter._pyfuse3_trio = lambda workers: nullcontext()
    fs, stop = MemVfs(arguments.timeout), trio.Event()
    options = adapter.MountOptions(**json.loads(arguments.options))
    lines = trio.lowlevel.FdStream(os.dup(0))

    async def talk(mounted):
        commands, pending = Commands(fs, mounted, stop), b""
        while chunk := await lines.receive_some():
            *complete, pending = (pending + chunk).split(b"\n")
            for line in complete:
                name, *values = json.loads(line)
                answer = await getattr(commands, name)(*values)
                os.write(1, json.dumps(answer).encode() + b"\n")
        stop.set()

    async with trio.open_nursery() as nursery:

        async def mount(task_status=trio.TASK_STATUS_IGNORED):
            await adapter.run(fs, arguments.mountpoint, options, stop=stop, task_status=task_status)
            nursery.cancel_scope.cancel()

        mounted = await nursery.start(mount)
        os.write(1, b'"ready"\n')
        nursery.start_soon(talk, mounted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint")
    parser.add_argument("--options", default="{}")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--timeout", type=float, default=300.0)
    trio.run(serve, parser.parse_args())
