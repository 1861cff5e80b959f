"""A mail server of a test: what it was sent over a real socket, message by message."""

from __future__ import annotations

import email
import email.policy
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from typing import cast


class _Session(socketserver.StreamRequestHandler):
    """One connection, in as much of RFC 5321 as smtplib speaks."""

    def handle(self) -> None:
        self._say("220 test")
        while line := self.rfile.readline():
            verb = line[:4].upper()
            if verb == b"DATA":
                self._say("354 go on")
                cast("Mailbox", self.server).receive(self._message())
            if verb == b"QUIT":
                self._say("221 bye")
                return
            self._say("250 ok")

    def _message(self) -> bytes:
        lines = iter(self.rfile.readline, b".\r\n")
        return b"".join(line[1:] if line.startswith(b"..") else line for line in lines)

    def _say(self, answer: str) -> None:
        self.wfile.write(f"{answer}\r\n".encode())


class Mailbox(socketserver.ThreadingTCPServer):
    """Listens on a free port of 127.0.0.1 and keeps what it receives."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Session)
        self.mails: list[EmailMessage] = []

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])

    def receive(self, message: bytes) -> None:
        """Keep one message."""
        self.mails.append(email.message_from_bytes(message, policy=email.policy.default))


@contextmanager
def open_mailbox() -> Iterator[Mailbox]:
    """Run a mailbox until the block ends."""
    with Mailbox() as mailbox:
        threading.Thread(target=mailbox.serve_forever, daemon=True).start()
        try:
            yield mailbox
        finally:
            mailbox.shutdown()
