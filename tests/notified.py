"""A notification daemon for tests: owns org.freedesktop.Notifications on a bus, and keeps what it is told."""

from __future__ import annotations

import contextlib
import queue
import threading

NAME = "org.freedesktop.Notifications"


class Desktop:
    """Shows nothing; ``told`` gets (summary, body) of each notification."""

    def __init__(self, address):
        from jeepney.io.blocking import open_dbus_connection

        self.told = queue.Queue()
        self._bus = open_dbus_connection(address)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        from jeepney import message_bus
        from jeepney.io.blocking import Proxy

        Proxy(message_bus, self._bus).RequestName(NAME)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._bus.close()

    def next(self, patience):
        """The next notification, waited for."""
        return self.told.get(timeout=patience)

    def _run(self):
        from jeepney import HeaderFields, MessageType, new_method_return

        with contextlib.suppress(Exception):  # the bus is closed under it at the end
            while True:
                message = self._bus.receive()
                if message.header.message_type != MessageType.method_call:
                    continue
                if message.header.fields[HeaderFields.member] == "Notify":
                    self.told.put((message.body[3], message.body[4]))
                    self._bus.send(new_method_return(message, "u", (self.told.qsize(),)))
