"""What somebody does on a machine of `machines.py`: one JSON line in, one out, until stdin ends."""

import json
import os
import sys


def read(path):
    with open(path, "rb", 0) as file:
        return file.read().decode("latin-1")


def write(path, text, flags=os.O_CREAT | os.O_TRUNC):
    """Write and fsync, as somebody who has to know that it is stored."""
    fd = os.open(path, os.O_WRONLY | flags, 0o644)
    try:
        os.write(fd, text.encode("latin-1"))
        os.fsync(fd)
    finally:
        os.close(fd)


CALLS = {
    "read": read,
    "write": write,
    "listdir": lambda path: sorted(os.listdir(path)),
    "mkdir": os.mkdir,
    "exists": os.path.exists,
    "whoami": lambda: [os.getuid(), os.getgid(), os.getgroups()],
    "getxattr": lambda path, name: os.getxattr(path, name).decode(),
    "open": lambda path, flags=os.O_RDONLY: os.open(path, flags),
    "pread": lambda fd: os.pread(fd, 1 << 20, 0).decode("latin-1"),
    "pwrite": lambda fd, text: os.pwrite(fd, text.encode("latin-1"), 0),
    "close": os.close,
}


def main():
    for line in sys.stdin:
        name, *values = json.loads(line)
        try:
            answer = {"result": CALLS[name](*values)}
        except OSError as error:
            answer = {"errno": error.errno, "text": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
