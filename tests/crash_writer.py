"""A program that works in a mount and writes down what it was promised.

Run as ``crash_writer.py DIR MANIFEST SEED``.

The manifest lies outside the mount, one JSON list a line, each line fsynced before the next step:

    ["intent", name, sha]   a file of that content is about to appear under a name it is renamed to
    ["maybe", name]         a file is about to be changed in place: until the next line its content is open
    ["file", name, sha]     fsync of the file, and of its directory, returned: this content must survive
    ["moving", old, new, sha]  that content is about to get another name: it has one of the two, and not both
    ["moved", old, new, sha]   the rename is durable
    ["dir", name]           the directory must be there
    ["xattr-maybe", name]   the attribute is about to change
    ["xattr", name, value]  the attribute must have that value
    ["maybe-gone", name]    the name is about to be removed
    ["gone", name]          the name was removed and its directory fsynced: it must stay away

It ends when the mount does.
"""

import hashlib
import json
import os
import random
import sys

base, manifest, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
dice = random.Random(seed)
log = os.open(manifest, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def say(*line):
    os.write(log, json.dumps(line).encode() + b"\n")
    os.fsync(log)


def sync_dir(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha(data):
    return hashlib.sha256(data).hexdigest()


def some_bytes():
    return dice.randbytes(dice.choice((0, 10, 5_000, 20_000, 70_000, 300_000, 900_000)))


def publish(name):
    """Save as an editor does: a temporary file, fsync, rename over."""
    data = some_bytes()
    say("intent", name, sha(data))
    temporary = f"{base}/.{os.path.basename(name)}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, f"{base}/{name}")
    sync_dir(base)
    say("file", name, sha(data))


def in_place(name):
    """Overwrite, append or cut an existing file, then fsync it."""
    path = f"{base}/{name}"
    with open(path, "rb") as file:
        data = bytearray(file.read())
    piece = some_bytes()
    at = dice.choice((0, len(data) // 2, len(data)))
    say("maybe", name)
    append = at == len(data) and dice.random() < 0.7
    fd = os.open(path, os.O_RDWR | (os.O_APPEND if append else 0))
    try:
        if append:
            os.write(fd, piece)
        else:
            os.pwrite(fd, piece, at)
        data[at : at + len(piece)] = piece
        if dice.random() < 0.3:
            cut = dice.randrange(len(data) + 1)
            os.ftruncate(fd, cut)
            del data[cut:]
        os.fsync(fd)
    finally:
        os.close(fd)
    say("file", name, sha(bytes(data)))


def attribute(name):
    value = str(dice.random())
    say("xattr-maybe", name)
    os.setxattr(f"{base}/{name}", "user.promise", value.encode())
    fd = os.open(f"{base}/{name}", os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    say("xattr", name, value)


def remove(name):
    say("maybe-gone", name)
    os.unlink(f"{base}/{name}")
    sync_dir(base)
    say("gone", name)


def move(old, new):
    """Give a file a name that is free."""
    with open(f"{base}/{old}", "rb") as file:
        digest = sha(file.read())
    say("moving", old, new, digest)
    os.rename(f"{base}/{old}", f"{base}/{new}")
    sync_dir(base)
    say("moved", old, new, digest)


def directory(number):
    """Make a directory with something in it, half of the time under another name at first."""
    name = f"dir{seed}-{number}"  # unlike those of the rounds before
    first = dice.choice((name, f"new{seed}-{number}"))
    data = some_bytes()
    os.mkdir(f"{base}/{first}")
    with open(f"{base}/{first}/inside", "wb") as file:
        file.write(data)
    if first != name:
        os.rename(f"{base}/{first}", f"{base}/{name}")
    sync_dir(base)
    say("dir", name)
    # What a directory's fsync acknowledges is all that was changed before it, in this filesystem.
    say("file", f"{name}/inside", sha(data))


def unsynced():
    """Work that is promised nothing, so that there is always something on its way."""
    with open(f"{base}/scratch{dice.randrange(20)}", "wb") as file:
        file.write(some_bytes())


os.makedirs(base, exist_ok=True)
number = 0
try:
    while True:
        number += 1
        here = [name for name in os.listdir(base) if name.startswith("file")]
        unsynced()
        step = dice.random()
        if step < 0.1:
            directory(number)
        elif step < 0.4 or len(here) < 4:
            publish(f"file{dice.randrange(30)}")
        elif step < 0.7:
            in_place(dice.choice(here))
        elif step < 0.77:
            move(dice.choice(here), f"file{seed}-{number}")
        elif step < 0.85:
            attribute(dice.choice(here))
        else:
            remove(dice.choice(here))
except OSError as error:
    print(f"the mount ended: {error}", file=sys.stderr)
